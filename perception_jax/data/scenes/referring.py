"""Referring expressions: phrases that are true of exactly one object of a scene.

A reference is a noun ("cat", "animal", "thing") and the fewest modifiers that rule out every
other object: colour, place, facing, a relation to another object, a superlative, a rank. A
modifier rules an object out only if it is beyond dispute that it is False of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from perception_jax.data.scenes import facts, phrases
from perception_jax.data.scenes.concepts import Concept
from perception_jax.data.scenes.facts import Fact, SceneFacts, Truth

MIN_RANK_GAP = 0.06
"""Smallest distance of centres along an axis for ranks along it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """A phrase for `scene.objects[target]`; `uses` lists the attributes in it, e.g. {"name"}."""

    text: str
    target: int
    uses: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True)
class _Noun:
    """What is said to be where: `claim` says of a concept whether the noun fits it."""

    text: str
    use: str
    claim: Callable[[Concept], Truth]


@dataclasses.dataclass(frozen=True, slots=True)
class _Modifier:
    """Words before or after the noun, and of which objects they are true."""

    before: str
    after: str
    use: str
    claim: Callable[[Fact], Truth]


def references(scene: SceneFacts, draw: random.Random) -> list[list[Reference]]:
    """Returns a few unique phrases for each object, with its name first; possibly none."""
    anchors = [item for item in scene.objects if scene.count(item.concept) == 1]
    return [_references(scene, target, anchors, draw) for target in range(len(scene.objects))]


def _references(
    scene: SceneFacts, target: int, anchors: Sequence[Fact], draw: random.Random
) -> list[Reference]:
    item = scene.objects[target]
    attributes = list(_attributes(item))
    found = []
    for noun in _nouns(item):
        if any(noun.claim(concept) is not False for concept in scene.doubtful):
            continue
        rivals = [
            other
            for other in scene.objects
            if other is not item and noun.claim(other.concept) is not False
        ]
        if rivals:
            modifiers = [*attributes, *_relations(item, anchors, draw)]
            modifiers = _distinguishing(item, noun, rivals, modifiers)
            found += [_phrase(noun, modifier, target) for modifier in modifiers]
        else:
            found.append(Reference(f"the {noun.text}", target, frozenset({noun.use})))
    return found


def _nouns(item: Fact) -> Iterator[_Noun]:
    concept = item.concept
    yield _Noun(concept.name, "name", lambda other: facts.is_a(other, concept))
    if category := phrases.category_noun(concept):
        yield _Noun(category, "category", lambda other: facts.of_category(other, concept.category))
    yield _Noun("thing", "", lambda other: True)


def _distinguishing(
    item: Fact,
    noun: _Noun,
    rivals: Sequence[Fact],
    modifiers: Sequence[_Modifier],
) -> list[_Modifier]:
    """The modifiers that rule out every rival by themselves; if there are none, two together."""
    found = [m for m in modifiers if all(m.claim(other) is False for other in rivals)]
    if all(noun.claim(other.concept) for other in rivals):
        found += [*_superlatives(item, rivals), *_ranks(item, rivals)]
    return found or _pairs(modifiers, rivals)


def _phrase(noun: _Noun, modifier: _Modifier, target: int) -> Reference:
    words = ["the", modifier.before, noun.text, modifier.after]
    uses = frozenset({noun.use, *modifier.use.split()})
    return Reference(" ".join(filter(None, words)), target, uses)


def _attributes(item: Fact) -> Iterator[_Modifier]:
    if phrases.colour_fits(item):
        colour = item.colour
        yield _Modifier(colour, "", "colour", lambda other: facts.has_colour(other, colour))
    if item.facing != "front":
        side = item.facing
        yield _Modifier("", f"facing {side}", "facing", lambda other: facts.faces(other, side))
    parts = phrases.sides(item)
    corner = [parts] if len(parts) > 1 else []
    for some in [*((part,) for part in parts), *corner]:
        yield _Modifier("", phrases.place(some), "place", _in_place(some))


def _in_place(parts: Sequence[facts.Side]) -> Callable[[Fact], Truth]:
    return lambda other: facts.conjunction(facts.at(other, part) for part in parts)


def _relations(item: Fact, anchors: Sequence[Fact], draw: random.Random) -> Iterator[_Modifier]:
    """The relation to one other object that goes by its name alone."""
    others = [anchor for anchor in anchors if anchor is not item]
    if others:
        anchor = draw.choice(others)
        if words := facts.relation(item, anchor):
            holds = facts.RELATIONS[words]
            yield _Modifier("", f"{words} the {anchor.name}", "relation", _relation(holds, anchor))


def _relation(holds: Callable[[Fact, Fact], Truth], anchor: Fact) -> Callable[[Fact], Truth]:
    return lambda other: False if other is anchor else holds(other, anchor)


def _superlatives(item: Fact, rivals: Sequence[Fact]) -> Iterator[_Modifier]:
    big, small = ("bigger", "smaller") if len(rivals) == 1 else ("biggest", "smallest")
    if all(facts.bigger(item, other) for other in rivals):
        yield _Modifier(big, "", "size", lambda other: False)
    if all(facts.bigger(other, item) for other in rivals):
        yield _Modifier(small, "", "size", lambda other: False)


def _ranks(item: Fact, rivals: Sequence[Fact]) -> Iterator[_Modifier]:
    """ "leftmost", "second … from the left" among three or more, from the nearer side."""
    if len(rivals) < 2:
        return
    for position, starts in _DIRECTIONS:
        here = position(item)
        row = sorted([here, *map(position, rivals)])
        if min(b - a for a, b in itertools.pairwise(row)) < MIN_RANK_GAP:
            continue
        rank = row.index(here)
        for (side, first), k in zip(starts, (rank, len(rivals) - rank), strict=True):
            if k == 0:
                yield _Modifier(first, "", "place rank", lambda other: False)
            elif k <= len(rivals) / 2:
                words = phrases.ORDINALS[k]
                yield _Modifier(words, f"from the {side}", "place rank", lambda other: False)


_DIRECTIONS: tuple[tuple[Callable[[Fact], float], tuple[tuple[str, str], ...]], ...] = (
    (lambda item: item.x, (("left", "leftmost"), ("right", "rightmost"))),
    (lambda item: item.y, (("top", "topmost"), ("bottom", "bottommost"))),
)
"""What a row is sorted by, and its two ends with the name of the object there."""


def _pairs(modifiers: Sequence[_Modifier], rivals: Sequence[Fact]) -> list[_Modifier]:
    """Two modifiers that only together rule out every rival; the first that works."""
    for k, first in enumerate(modifiers):
        for second in modifiers[k + 1 :]:
            if first.use == second.use or (first.before and second.before):
                continue
            if all(first.claim(o) is False or second.claim(o) is False for o in rivals):
                after = " ".join(filter(None, (first.after, second.after)))
                use = f"{first.use} {second.use}"
                return [_Modifier(first.before or second.before, after, use, lambda other: False)]
    return []
