"""English phrases: articles, noun phrases, places, lists.

Concept names are count noun phrases ("pair of scissors"), so an article or a number always fits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from perception_jax.data.scenes import concepts, palette
from perception_jax.data.scenes.concepts import Concept
from perception_jax.data.scenes.facts import SIZE_WORDS, Fact, Side, at
from perception_jax.data.scenes.spec import Background

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
"""Number words from 0."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
"""Ordinal words from 1."""

CATEGORY_NOUNS = {
    "animal": ("animal", "animals"),
    "plant": ("plant", "plants"),
    "vehicle": ("vehicle", "vehicles"),
}
"""Categories that have a plain English noun: singular and plural."""

_VOWEL_LETTERS = frozenset("aeiou")
_SAID_YOU = ("uni", "use", "eu", "uku", "ute", "one")
_SILENT_H = ("hour", "honest", "heir", "x-ray")


@functools.cache
def indefinite(noun: str) -> str:
    """Adds "a" or "an": "an hourglass", "a unicorn"."""
    if noun.startswith(_SILENT_H):
        return f"an {noun}"
    vowel = noun[0] in _VOWEL_LETTERS and not noun.startswith(_SAID_YOU)
    return f"an {noun}" if vowel else f"a {noun}"


def number_of(count: int, singular: str, plural: str) -> str:
    """ "a cat", "two cats", "no cats"."""
    return indefinite(singular) if count == 1 else f"{NUMBERS[count]} {plural}"


def enumeration(parts: Sequence[str]) -> str:
    """ "a cat", "a cat and a dog", "a cat, a dog and a cup"."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def size_adjective(fact: Fact) -> str | None:
    """The object's size word as an adjective, if its size is clear and the word cannot be taken
    for a part of a name ("small airplane")."""
    word = fact.plain_size
    if word is None or not _takes_size(fact.name):
        return None
    return "medium-sized" if word == "medium" else word


@functools.cache
def _takes_size(name: str) -> bool:
    """No name is a size word before this one, nor is there one in it."""
    names = {concept.name for concept in concepts.concepts()}
    longer = any(f"{word} {name}" in names for word in SIZE_WORDS)
    return not longer and not _words(name) & set(SIZE_WORDS)


@functools.cache
def _words(name: str) -> frozenset[str]:
    return frozenset(name.split())


def colour_fits(fact: Fact) -> bool:
    """Whether a colour adjective fits before the name ("a red green apple" does not)."""
    return fact.colour is not None and not _words(fact.name) & _COLOUR_WORDS


_COLOUR_WORDS = frozenset((*palette.NAMES, "gold", "silver"))


def category_noun(concept: Concept) -> str | None:
    """The concept's category as a noun, unless its name gives that away ("potted plant")."""
    noun = CATEGORY_NOUNS.get(concept.category)
    return None if noun is None or noun[0] in _words(concept.name) else noun[0]


def described(noun: str, *adjectives: str | None) -> str:
    """The noun with its adjectives, without an article."""
    return " ".join([*filter(None, adjectives), noun])


def sides(fact: Fact) -> tuple[Side, ...]:
    """The part of the canvas the object is clearly in: ("top", "left"), ("middle",), ()."""
    if at(fact, "middle"):
        return ("middle",)
    return tuple(filter(None, (fact.vertical, fact.horizontal)))


_PLACES = {
    ("left",): "on the left",
    ("right",): "on the right",
    ("top",): "at the top",
    ("bottom",): "at the bottom",
    ("middle",): "in the middle",
}


RELATION_QUESTIONS = {
    "x": (
        ("to the left of", "to the right of"),
        "Is {} to the left or to the right of {}?",
        ("left", "right"),
    ),
    "y": (("above", "below"), "Is {} above or below {}?", ("above", "below")),
}
"""Axis → two opposite relations, a question that tells them apart, and its answers."""
SIDE_QUESTIONS = {
    "x": ("Is {} on the left or on the right of the picture?", ("left", "right")),
    "y": ("Is {} at the top or at the bottom of the picture?", ("top", "bottom")),
}
"""Axis → a question about the place of an object, and its answers."""


def place(parts: tuple[Side, ...]) -> str:
    """ "at the top left", "on the left", "in the middle"."""
    return _PLACES[parts] if len(parts) == 1 else f"at the {' '.join(parts)}"


_BACKDROPS = {
    "flat": "plain {} background",
    "gradient": "background that fades from {} to {}",
    "noise": "blotchy {} and {} background",
    "texture": "patterned {} and {} background",
    "collage": "busy {} background",
}


def backdrop(background: Background) -> str:
    """ "a plain blue background", "a patterned red and white background"."""
    return indefinite(_BACKDROPS[background.kind].format(*background.colours))
