"""Captions of a whole scene and of one object, with and without class names."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

from perception_jax.data.scenes import facts, phrases
from perception_jax.data.scenes.facts import Fact, SceneFacts

MEDIA = ("photo", "picture", "drawing", "image")
"""Words for an image."""
MAX_LISTED = 4
"""Number of classes that a plain caption lists before "and other things"."""
NEAR, FAR = 0.75, 0.18
"""An object of at least `NEAR` is close up, one of at most `FAR` far away: longest side of the
sprite, in shorter sides of the canvas."""
MAX_DETAILED = 3
"""Number of objects that one caption describes with adjectives."""


def scene_captions(scene: SceneFacts, draw: random.Random) -> list[str]:
    """A plain caption, one with details, and one without class names; 3 to about 25 words."""
    if not scene.objects:
        return [f"{phrases.indefinite(draw.choice(MEDIA))} of {phrases.backdrop(scene.background)}"]
    return [_plain(scene, draw), _detailed(scene, draw), _unnamed(scene, draw)]


def fact_caption(scene: SceneFacts, draw: random.Random) -> str:
    """States one fact of one or two objects, of a kind drawn at random; "" if nothing is certain.

    Kinds: direction, place, relation, colour, number, distance and view.
    """
    makers = [_relation, _number, *(functools.partial(_one, say=say) for say in _SAYINGS)]
    draw.shuffle(makers)
    text = next(filter(None, (make(scene, draw) for make in makers)), "")
    return text and f"{phrases.indefinite(draw.choice(MEDIA))} of {text}"


def _relation(scene: SceneFacts, draw: random.Random) -> str:
    found = _relation_form(scene, draw)
    return found[0] if found else ""


def _number(scene: SceneFacts, draw: random.Random) -> str:
    """ "two cats", "three animals"; "" if nothing is there more than once beyond doubt."""
    concepts = {item.name: item.concept for item in scene.objects}.values()
    counted = [(scene.count(concept), concept.name, concept.plural) for concept in concepts]
    counted += [
        (scene.count_category(category), *nouns)
        for category, nouns in phrases.CATEGORY_NOUNS.items()
    ]
    several = [phrases.number_of(*one) for one in counted if one[0] and one[0] > 1]
    return draw.choice(several) if several else ""


def _one(scene: SceneFacts, draw: random.Random, *, say: Callable[[Fact], str]) -> str:
    said = list(filter(None, map(say, scene.objects)))
    return draw.choice(said) if said else ""


def _said_facing(item: Fact) -> str:
    return _facing(item) and phrases.indefinite(item.name) + _facing(item)


def _said_place(item: Fact) -> str:
    where = phrases.sides(item)
    return f"{phrases.indefinite(item.name)} {phrases.place(where)}" if where else ""


def _said_colour(item: Fact) -> str:
    fits = phrases.colour_fits(item)
    return phrases.indefinite(f"{item.colour} {item.name}") if fits else ""


def _said_distance(item: Fact) -> str:
    if not item.whole or FAR < item.full < NEAR:
        return ""
    return f"{phrases.indefinite(item.name)} {'close up' if item.full >= NEAR else 'far away'}"


def _said_view(item: Fact) -> str:
    if item.concept.view is None:
        return ""
    side = item.name if item.concept.view == "side" else item.concept.counterpart
    return f"{phrases.indefinite(side)} seen from the {item.concept.view}"


_SAYINGS = (_said_facing, _said_place, _said_colour, _said_distance, _said_view)
"""Functions that state a fact of one object, or "" where it is not certain."""


def object_captions(item: Fact, draw: random.Random) -> tuple[str, str]:
    """Returns captions of one object with its class name and without it."""
    colour = item.colour if phrases.colour_fits(item) else None
    noun = phrases.described(item.name, phrases.size_adjective(item), colour)
    where = phrases.sides(item)
    place = f" {phrases.place(where)} of the picture" if where else ""
    named = phrases.indefinite(noun) + _facing(item) + place
    return named, _unnamed_object(item, draw)


def _plain(scene: SceneFacts, draw: random.Random) -> str:
    """ "a photo of two cats, a dog and a cup"."""
    kinds = _one_of_each(scene)
    shown = kinds if len(kinds) <= MAX_LISTED else draw.sample(kinds, MAX_LISTED - 1)
    parts = [_group(scene, item) for item in shown]
    if len(kinds) > len(shown):
        parts.append("other things")
    return f"{phrases.indefinite(draw.choice(MEDIA))} of {phrases.enumeration(parts)}"


def _one_of_each(scene: SceneFacts) -> list[Fact]:
    """One object of each name."""
    return list({item.name: item for item in scene.objects}.values())


def _group(scene: SceneFacts, item: Fact) -> str:
    seen = sum(other.name == item.name for other in scene.objects)
    if seen == 1:
        return phrases.indefinite(item.name)
    certain = scene.count(item.concept) is not None
    return phrases.number_of(seen, item.name, item.plural) if certain else item.plural


def _detailed(scene: SceneFacts, draw: random.Random) -> str:
    """One of three forms that the scene allows, sometimes with background or written word."""
    forms = [_list_form, _relation_form, _places_form]
    draw.shuffle(forms)
    text, preposition = next(filter(None, (form(scene, draw) for form in forms)))
    chance = draw.random()
    if scene.text and chance < 0.4:
        return f'{text}, with the word "{scene.text.text}" in {scene.text.colour} letters'
    if chance < 0.7:
        return f"{text} {preposition} {phrases.backdrop(scene.background)}"
    return text if text.count(" ") > 1 else f"{phrases.indefinite(draw.choice(MEDIA))} of {text}"


def _list_form(scene: SceneFacts, draw: random.Random) -> tuple[str, str]:
    """ "a small red cat and a huge dog facing left"."""
    kinds = _one_of_each(scene)
    some = draw.sample(kinds, min(len(kinds), MAX_DETAILED))
    parts = [_noun_phrase(item, draw, item.name) + _facing(item) for item in some]
    return phrases.enumeration(parts), "on"


def _relation_form(scene: SceneFacts, draw: random.Random) -> tuple[str, str] | None:
    """ "a red cat to the left of a dog"."""
    if len(scene.objects) < 2:
        return None
    item, other = draw.sample(scene.objects, 2)
    relation = facts.relation(item, other)
    if relation is None or item.name == other.name:
        return None
    first, second = (_noun_phrase(f, draw, f.name) for f in (item, other))
    return f"{first} {relation} {second}", "on"


def _places_form(scene: SceneFacts, draw: random.Random) -> tuple[str, str] | None:
    """ "a cat at the top left and a red dog on the right"."""
    placed = [item for item in scene.objects if phrases.sides(item)]
    if not placed:
        return None
    some = draw.sample(placed, min(len(placed), 2))
    parts = [f"{_noun_phrase(f, draw, f.name)} {phrases.place(phrases.sides(f))}" for f in some]
    return phrases.enumeration(parts), "of"


def _noun_phrase(item: Fact, draw: random.Random, noun: str) -> str:
    """The noun with "a" or "an" and some of the adjectives that are true of the object."""
    size = phrases.size_adjective(item) if draw.random() < 0.5 else None
    colour = item.colour if phrases.colour_fits(item) and draw.random() < 0.75 else None
    return phrases.indefinite(phrases.described(noun, size, colour))


def _facing(item: Fact) -> str:
    return "" if item.facing == "front" else f" facing {item.facing}"


def _unnamed(scene: SceneFacts, draw: random.Random) -> str:
    """ "two animals on a plain blue background", "something small and red at the top left of …"."""
    total = len(scene.objects)
    if total > 1 and not scene.doubtful and draw.random() < 0.4:
        text = f"{phrases.NUMBERS[total]} things"
        return f"{_kinds(scene) or text} on {phrases.backdrop(scene.background)}"
    item = draw.choice(scene.objects)
    where = phrases.sides(item)
    joint = f"{phrases.place(where)} of" if where else "on"
    return f"{_something(item, draw)}{_facing(item)} {joint} {phrases.backdrop(scene.background)}"


def _kinds(scene: SceneFacts) -> str:
    """ "two animals and a vehicle", or "" if there are none or their number is unclear."""
    parts = []
    for category, nouns in phrases.CATEGORY_NOUNS.items():
        if count := scene.count_category(category):
            parts.append(phrases.number_of(count, *nouns))
    return phrases.enumeration(parts) if parts else ""


def _something(item: Fact, draw: random.Random) -> str:
    """ "something small and red", "a small red animal"."""
    noun = phrases.category_noun(item.concept)
    if noun and draw.random() < 0.5:
        return _noun_phrase(item, draw, noun)
    colour = item.colour if phrases.colour_fits(item) else None
    qualities = list(filter(None, (phrases.size_adjective(item), colour)))
    return f"something {phrases.enumeration(qualities)}" if qualities else "something"


def _unnamed_object(item: Fact, draw: random.Random) -> str:
    """ "something small and red facing left on the right of the picture"."""
    where = phrases.sides(item)
    place = phrases.place(where) + " of" if where else "in"
    return f"{_something(item, draw)}{_facing(item)} {place} the picture"
