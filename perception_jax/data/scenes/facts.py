"""Facts about a rendered scene, including what is ambiguous.

Everything that the scenes say in words is drawn from here. A claim has three values: True or False
where no one would argue, None in between. A phrase about an object is used only if its claims are
True of that object, and it counts as unique only if one of them is False of every other object.

Lengths are in units of the canvas's shorter side, positions in fractions of the canvas.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from perception_jax.data.scenes import concepts
from perception_jax.data.scenes.concepts import Concept
from perception_jax.data.scenes.spec import (
    Background,
    DrawnText,
    Facing,
    RenderedObject,
    SceneSpec,
)

Truth = bool | None
"""A three-valued truth value; None is ambiguous."""

Side = Literal["left", "right", "top", "bottom", "middle"]
"""A part of the canvas."""

SIZE_WORDS = ("tiny", "small", "medium", "large", "huge")
"""Size words from small to large."""
SIZE_LIMITS = (0.1, 0.22, 0.45, 0.7)
"""Upper limits of the first four size words: longest side of the visible box divided by the
canvas's shorter side."""

WHOLE = 0.75
"""Visible share from which on size and shape of an object can be judged."""
SIDE_LIMIT = 0.4
"""Centres below this are on the left (or at the top), above 1 minus it on the right."""
MIDDLE_LIMIT = 0.1
"""Largest distance from the canvas's centre of an object in the middle."""
MIN_OFFSET = 0.12
"""Smallest distance of centres along an axis for a spatial relation."""
MIN_RATIO = 1.35
"""Smallest ratio of longest sides for one object to be bigger."""

_CONFUSED = {
    "red": ("orange", "pink", "brown", "purple"),
    "orange": ("yellow", "brown", "pink"),
    "yellow": ("brown", "green", "white"),
    "blue": ("purple", "grey", "black"),
    "purple": ("pink", "brown", "black"),
    "pink": ("white",),
    "brown": ("black", "grey"),
    "grey": ("black", "white"),
}
ALIKE = frozenset(
    pair
    for one, many in _CONFUSED.items()
    for other in many
    for pair in ((one, other), (other, one))
)
"""Ordered pairs of colours that two people may name differently on one drawing."""

DISTINCT_CATEGORIES = {
    "animal": frozenset({"activity", "food"}),
    "plant": frozenset({"food", "place", "activity"}),
    "vehicle": frozenset({"activity", "object"}),
    "food": frozenset({"animal", "plant", "object"}),
}
"""Unambiguous categories → other categories with members that could be counted in them."""


def conjunction(claims: Iterable[Truth]) -> Truth:
    """Three-valued "and": False if one is False, else None if one is None."""
    result: Truth = True
    for claim in claims:
        if claim is False:
            return False
        if claim is None:
            result = None
    return result


def size_word(side: float) -> str:
    """Returns the size word of a box whose longest side is `side` × the canvas's shorter side."""
    for word, limit in zip(SIZE_WORDS, SIZE_LIMITS, strict=False):
        if side < limit:
            return word
    return SIZE_WORDS[-1]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One visible object.

    Attributes:
      index: position among the rendered objects.
      colour: the colour a person would name, or None where there is no clear one.
      size: one of `SIZE_WORDS`, of the visible box.
      facing: "front" where the drawing has no side or is turned too far.
      x, y: centre of the visible box, fractions of the canvas.
      box: visible box, xyxy, in shorter sides of the canvas.
      full: longest side of the whole sprite, in shorter sides.
      whole: enough of it is visible to judge its size.
    """

    index: int
    concept: Concept
    colour: str | None
    size: str
    facing: Facing
    x: float
    y: float
    box: tuple[float, float, float, float]
    full: float
    whole: bool

    @property
    def name(self) -> str:
        return self.concept.name

    @property
    def plural(self) -> str:
        return self.concept.plural

    @property
    def category(self) -> str:
        return self.concept.category

    @property
    def horizontal(self) -> Literal["left", "right"] | None:
        """Half of the canvas the object is in, if it is clearly in one."""
        return next((side for side in ("left", "right") if at(self, side)), None)

    @property
    def vertical(self) -> Literal["top", "bottom"] | None:
        return next((side for side in ("top", "bottom") if at(self, side)), None)

    @property
    def plain_size(self) -> str | None:
        """The size word if it would still hold for a box some 8 % larger or smaller."""
        side = max(self.box[2] - self.box[0], self.box[3] - self.box[1])
        words = {size_word(side * 0.92), size_word(side * 1.08), size_word(self.full)}
        return self.size if self.whole and words == {self.size} else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SceneFacts:
    """All facts of a scene.

    Attributes:
      objects: what can be seen clearly, in drawing order.
      doubtful: concepts that are drawn but hidden, cut off or faint: neither present nor absent.
      families: of everything that is drawn.
    """

    objects: tuple[Fact, ...]
    doubtful: tuple[Concept, ...]
    families: frozenset[str]
    background: Background
    text: DrawnText | None

    def count(self, concept: Concept) -> int | None:
        """Number of objects of the concept; None if ambiguous."""
        return _total([is_a(o.concept, concept) for o in self.objects], self._may_be(concept))

    def count_category(self, category: str) -> int | None:
        """Number of objects of one of `DISTINCT_CATEGORIES`; None if ambiguous."""
        claims = [of_category(o.concept, category) for o in self.objects]
        doubtful = any(of_category(c, category) is not False for c in self.doubtful)
        return _total(claims, doubtful)

    def absent(self, concept: Concept) -> bool:
        """Whether no drawn object, however faint, could have the concept's name."""
        return concept.family not in self.families

    def _may_be(self, concept: Concept) -> bool:
        return any(other.family == concept.family for other in self.doubtful)


def _total(claims: Sequence[Truth], doubtful: bool) -> int | None:
    return None if doubtful or None in claims else sum(claims)


def observe(
    spec: SceneSpec,
    objects: Sequence[RenderedObject],
    *,
    canvas: tuple[int, int],
    min_visible: float,
) -> SceneFacts:
    """Collects the facts of a rendered scene.

    Args:
      objects: the rendered placements; those seen by less than `min_visible` become doubtful.
      canvas: (height, width) in pixels.
      min_visible: smallest visible share of an object that counts as seen.
    """
    height, width = canvas
    short = min(height, width)
    seen, doubtful = [], []
    for index, item in enumerate(objects):
        if item.visible < min_visible:
            doubtful.append(concepts.by_name(item.placement.concept))
        else:
            seen.append(_fact(index, item, height, width, short))
    doubtful += [concepts.by_name(p.concept) for p in spec.background.placements]
    return SceneFacts(
        objects=tuple(seen),
        doubtful=tuple(doubtful),
        families=frozenset(
            concept.family for concept in (*doubtful, *(fact.concept for fact in seen))
        ),
        background=spec.background,
        text=spec.text,
    )


def _fact(index: int, item: RenderedObject, height: int, width: int, short: int) -> Fact:
    placement = item.placement
    left, top, right, bottom = item.box
    return Fact(
        index=index,
        concept=concepts.by_name(placement.concept),
        colour=concepts.colour_of(placement),
        size=size_word(max(right - left, bottom - top) / short),
        facing=concepts.facing_of(placement),
        x=(left + right) / 2 / width,
        y=(top + bottom) / 2 / height,
        box=(left / short, top / short, right / short, bottom / short),
        full=placement.size,
        whole=item.visible >= WHOLE,
    )


def is_a(concept: Concept, other: Concept) -> Truth:
    """Whether the name of one concept applies to another; None within a family."""
    if concept.name == other.name:
        return True
    return None if concept.family == other.family else False


def of_category(concept: Concept, category: str) -> Truth:
    """Whether a concept is in one of `DISTINCT_CATEGORIES`; None for families of its members."""
    if concept.category == category:
        return True
    unclear = concept.category in DISTINCT_CATEGORIES[
        category
    ] or concept.family in _member_families(category)
    return None if unclear else False


@functools.cache
def _member_families(category: str) -> frozenset[str]:
    return frozenset(c.family for c in concepts.concepts() if c.category == category)


def has_colour(fact: Fact, colour: str) -> Truth:
    """Whether a person would call the object that colour."""
    if fact.colour == colour:
        return True
    return None if fact.colour is None or (fact.colour, colour) in ALIKE else False


def faces(fact: Fact, side: Literal["left", "right"]) -> Truth:
    """Whether the object faces that side of the canvas."""
    return None if fact.facing == "front" else fact.facing == side


def at(fact: Fact, side: Side) -> Truth:
    """Whether the object is in that part of the canvas."""
    if side == "middle":
        off = max(abs(fact.x - 0.5), abs(fact.y - 0.5))
        return True if off <= MIDDLE_LIMIT else (False if off >= 0.2 else None)
    along = fact.x if side in ("left", "right") else fact.y
    along = 1.0 - along if side in ("right", "bottom") else along
    if along < SIDE_LIMIT:
        return True
    return False if along > 0.5 else None


def left_of(fact: Fact, other: Fact) -> Truth:
    """Whether the object is to the left of the other one."""
    return _before(fact.box, other.box, 0)


def above(fact: Fact, other: Fact) -> Truth:
    """Whether the object is above the other one."""
    return _before(fact.box, other.box, 1)


def _before(box: Sequence[float], other: Sequence[float], axis: int) -> Truth:
    """True if the centres are ordered along the axis, more than across it, and the boxes do not
    reach past each other's centres."""
    centre, other_centre = (box[axis] + box[axis + 2]) / 2, (other[axis] + other[axis + 2]) / 2
    offset = other_centre - centre
    if offset <= 0.0:
        return False
    cross = 1 - axis
    across = abs(other[cross] + other[cross + 2] - box[cross] - box[cross + 2]) / 2
    apart = box[axis + 2] <= other_centre and other[axis] >= centre
    return True if offset >= max(MIN_OFFSET, across) and apart else None


RELATIONS: Mapping[str, Callable[[Fact, Fact], Truth]] = MappingProxyType(
    {
        "to the left of": left_of,
        "to the right of": lambda fact, other: left_of(other, fact),
        "above": above,
        "below": lambda fact, other: above(other, fact),
    }
)
"""Spatial relations as words and predicates."""


def relation(fact: Fact, other: Fact) -> str | None:
    """Returns the words of `RELATIONS` that are true of the two; at most one is."""
    return next((words for words, holds in RELATIONS.items() if holds(fact, other)), None)


def bigger(fact: Fact, other: Fact) -> Truth:
    """Whether the object is bigger than the other one, both as seen and as drawn."""
    if _outgrows(fact, other):
        return True
    return False if _outgrows(other, fact) else None


def _outgrows(fact: Fact, other: Fact) -> bool:
    width, height = fact.box[2] - fact.box[0], fact.box[3] - fact.box[1]
    other_width, other_height = other.box[2] - other.box[0], other.box[3] - other.box[1]
    return (
        max(width, height) >= MIN_RATIO * max(other_width, other_height)
        and width * height >= MIN_RATIO * other_width * other_height
        and fact.full >= other.full
    )
