"""Phrases that are true of exactly one object of a scene.

A reference is a noun ("cat", "animal", "thing") and the fewest modifiers that rule out every
other object: colour, place, facing, a relation to another object, a superlative, a rank. A
modifier rules an object out only if it is beyond dispute that it is False of it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence

from perception_jax.data.scenes import facts, phrases
from perception_jax.data.scenes.concepts import Concept
from perception_jax.data.scenes.facts import Claim, Fact, SceneFacts

MIN_RANK_GAP = 0.06
"""Objects whose centres are closer than this along an axis have no rank along it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Reference:
    """A phrase for `scene.objects[target]`; `uses` names what it gives away, e.g. {"name"}."""

    text: str
    target: int
    uses: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True)
class _Noun:
    """What is said to be where: `claim` says of a concept whether the noun fits it."""

    text: str
    use: str
    claim: Callable[[Concept], Claim]


@dataclasses.dataclass(frozen=True, slots=True)
class _Modifier:
    """Words before or after the noun, and of which objects they are true."""

    before: str
    after: str
    use: str
    claim: Callable[[Fact], Claim]


def references(scene: SceneFacts, target: int, rng: random.Random) -> list[Reference]:
    """A few unique phrases for an object, by its name first, then without it; may be empty."""
    found = []
    for noun in _nouns(scene.objects[target]):
        if any(noun.claim(concept) is not False for concept in scene.doubtful):
            continue
        found += _with_noun(scene, target, noun, rng)
    return found


def unique_by_name(scene: SceneFacts) -> list[int]:
    """Objects that "the {name}" alone picks out."""
    return [k for k, item in enumerate(scene.objects) if scene.count(item.concept) == 1]


def _nouns(item: Fact) -> Iterator[_Noun]:
    concept = item.concept
    yield _Noun(concept.name, "name", lambda other: facts.is_a(other, concept))
    if category := phrases.category_noun(concept):
        yield _Noun(category, "category", lambda other: facts.of_category(other, concept.category))
    yield _Noun("thing", "", lambda other: True)


def _with_noun(scene: SceneFacts, target: int, noun: _Noun, rng: random.Random) -> list[Reference]:
    """One phrase per kind of modifier, or the bare noun if that is unique."""
    item = scene.objects[target]
    rivals = [
        other
        for k, other in enumerate(scene.objects)
        if k != target and noun.claim(other.concept) is not False
    ]
    if not rivals:
        return [Reference(f"the {noun.text}", target, frozenset({noun.use}))]
    modifiers = [*_attributes(item), *_relations(scene, target, noun, rng)]
    certain = all(noun.claim(other.concept) for other in rivals)
    single = [m for m in modifiers if all(m.claim(other) is False for other in rivals)]
    if certain:
        single += [*_superlatives(item, rivals), *_ranks(item, rivals)]
    if not single:
        single = _pairs([m for m in modifiers if m.use != "relation"], rivals)
    return [_phrase(noun, m, target) for m in single]


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


def _in_place(parts: Sequence[facts.Side]) -> Callable[[Fact], Claim]:
    return lambda other: facts.conjunction(facts.at(other, part) for part in parts)


def _relations(
    scene: SceneFacts, target: int, noun: _Noun, rng: random.Random
) -> Iterator[_Modifier]:
    """Relations to one other object that goes by its name alone."""
    anchors = [k for k in unique_by_name(scene) if k != target]
    if not anchors:
        return
    anchor = scene.objects[rng.choice(anchors)]
    if noun.use == "name" and noun.claim(anchor.concept) is not False:
        return
    for words, holds in facts.RELATIONS.items():
        if holds(scene.objects[target], anchor):
            yield _Modifier("", f"{words} the {anchor.name}", "relation", _relation(holds, anchor))


def _relation(holds: Callable[[Fact, Fact], Claim], anchor: Fact) -> Callable[[Fact], Claim]:
    return lambda other: False if other is anchor else holds(other, anchor)


def _superlatives(item: Fact, rivals: Sequence[Fact]) -> Iterator[_Modifier]:
    big, small = ("bigger", "smaller") if len(rivals) == 1 else ("biggest", "smallest")
    if all(facts.bigger(item, other) for other in rivals):
        yield _Modifier(big, "", "size", lambda other: False)
    if all(facts.bigger(other, item) for other in rivals):
        yield _Modifier(small, "", "size", lambda other: False)


def _ranks(item: Fact, rivals: Sequence[Fact]) -> Iterator[_Modifier]:
    """ "second … from the left" among three or more."""
    if len(rivals) < 2:
        return
    for side, reverse, position in (
        ("left", False, lambda other: other.x),
        ("right", True, lambda other: other.x),
        ("top", False, lambda other: other.y),
        ("bottom", True, lambda other: other.y),
    ):
        row = sorted([item, *rivals], key=position, reverse=reverse)
        gaps = (abs(position(a) - position(b)) for a, b in zip(row, row[1:], strict=False))
        if min(gaps) >= MIN_RANK_GAP:
            rank = phrases.ORDINALS[row.index(item)]
            yield _Modifier(rank, f"from the {side}", "place rank", lambda other: False)


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
