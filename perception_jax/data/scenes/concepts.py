"""The concepts of scenes: names, plurals, categories, colours, orientations.

The table is `assets/concepts.json`, built with the sprite archive. A name is a count noun phrase
("pair of scissors", "slice of pizza"), so "a", "two" and "the" fit before it (or its plural)
without further knowledge.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping
from types import MappingProxyType

from perception_jax.data.scenes.spec import Facing, Placement
from perception_jax.errors import DataError, did_you_mean

CATEGORIES = ("animal", "plant", "food", "object", "activity", "vehicle", "place", "sky")
"""Every concept has one. "food" includes drinks; "activity" is sport, play and celebration; "sky"
is weather and heavenly bodies."""

MAX_FACING_ANGLE = 20.0
"""Rotation in degrees above which a sprite does not count as facing left or right."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """A named object that all five artists drew.

    Attributes:
      name: singular, lower case, unique, e.g. "red apple".
      plural: e.g. "red apples".
      category: one of `CATEGORIES`.
      colour: a name of `palette.COLOURS` that dominates most of its five drawings, or None. For
        one drawing ask `colour_of`, which knows the artist and the tint.
      colours: the dominating colour of each style's drawing; styles without one are left out.
      facing: side that all five drawings face; "front" where they have no side or disagree.
      family: the noun shared by concepts that one noun could name ("bus" for "bus" and "oncoming
        bus"); the concept's own name where there are no others. A sampled scene has at most one
        concept of a family, and the absence of a concept does not imply that of its family.
      state: "closed" or "open" if `counterpart` is the same thing in the other state, else None.
      view: "side" or "front" if `counterpart` is the same thing from the other side, else None.
      counterpart: name of the concept that shows the same thing in the other state or view.
      held_out: never in the "train" split.
    """

    name: str
    plural: str
    category: str
    colour: str | None
    colours: Mapping[str, str] = dataclasses.field(hash=False)
    facing: Facing
    family: str
    state: str | None = None
    view: str | None = None
    counterpart: str | None = None
    held_out: bool = False


@functools.cache
def _table() -> Mapping[str, Concept]:
    file = importlib.resources.files("perception_jax.data.scenes") / "assets" / "concepts.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["concepts"]
    return MappingProxyType(
        {
            row["name"]: Concept(
                **{"family" if key == "kin" else key: value for key, value in row.items()}
            )
            for row in rows
        }
    )


def concepts(*, held_out: bool | None = None) -> tuple[Concept, ...]:
    """Returns the concepts in a fixed order: held-out ones if True, the others if False, or all."""
    return tuple(c for c in _table().values() if held_out in (None, c.held_out))


def by_name(name: str) -> Concept:
    """Returns the concept of that name.

    Raises:
      DataError: no such concept; the message suggests the nearest names.
    """
    try:
        return _table()[name]
    except KeyError:
        hint = did_you_mean(name, _table())
        raise DataError(
            f"expected the name of a scenes concept, found {name!r}{hint} "
            "`perception_jax.data.scenes.concepts()` lists them all."
        ) from None


def family_of(concept: Concept) -> tuple[Concept, ...]:
    """Returns the concepts of one family, `concept` included, in table order."""
    return tuple(c for c in _table().values() if c.family == concept.family)


def colour_of(placement: Placement) -> str | None:
    """The colour a person would name for the placement as drawn: its tint, or its drawing's own
    dominating colour, or None where no one colour dominates."""
    return placement.tint or by_name(placement.concept).colours.get(placement.style)


def facing_of(placement: Placement) -> Facing:
    """Returns the side that the placement faces: mirrored by `flip`, "front" beyond the largest
    angle."""
    facing = by_name(placement.concept).facing
    if facing == "front" or abs(placement.angle) > MAX_FACING_ANGLE:
        return "front"
    if placement.flip:
        return "right" if facing == "left" else "left"
    return facing
