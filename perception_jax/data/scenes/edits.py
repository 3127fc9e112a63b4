"""One spec, changed in one respect: the nine visual patterns of MMVP (arXiv 2401.06209, §2).

Each maker lays out a small scene in which nothing covers anything, and returns two versions of it
with a question that tells them apart. What a pattern changes:

| pattern | changes |
| --- | --- |
| orientation | `flip` of one object that has a side |
| presence | one object is there or not |
| state | one object open or closed, the right way up or upside down, solid or faded |
| count | one more or one fewer of a kind |
| position | x or y of one object: on either side of another one, or of the canvas |
| colour | `tint` of one object |
| structure | x and y of a group: side by side, one above another, in a circle |
| text | the word |
| viewpoint | `size` of one object (close up, far away), or its drawing from the side or the front |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from perception_jax.data.scenes import concepts as table
from perception_jax.data.scenes import facts, palette, phrases
from perception_jax.data.scenes.concepts import Concept
from perception_jax.data.scenes.sample import can_be_tinted
from perception_jax.data.scenes.silhouettes import text_extent
from perception_jax.data.scenes.spec import DrawnText, Placement, SceneSpec
from perception_jax.data.scenes.studio import CELLS, CENTRES, Cell, Studio, copy
from perception_jax.data.scenes.words import WORDS

COUNTS = (1, 4)
"""Range of a count pair's smaller number."""
GROUP = (4, 6)
"""Range of the number of objects in a structure pair."""
RADIUS = 0.34
"""Of a circle of objects, in shorter sides of the canvas."""
FILL = 0.85
"""Size of the objects of a group, as a fraction of their distance."""
NEAR, FAR = (0.75, 0.9), (0.12, 0.18)
"""Sizes in a viewpoint pair."""
LARGE = (0.5, 0.75)
"""Sizes of an object that may be faded: it must be seen well to be told from a solid one."""
FADED_OPACITY = 0.55
TEXT_SIZE = (0.14, 0.2)
TEXT_ROOM = 0.94
"""Widest word, as a fraction of the canvas."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PairSpec:
    """Two specs that differ in one respect, and words that tell them apart.

    Attributes:
      changed: indices of the placements that differ; () if it is the written word.
      answers: `answers[k]` is right for `specs[k]`.
      statements: `statements[k]` is true of `specs[k]` only; a noun phrase that fits "a photo of".
    """

    specs: tuple[SceneSpec, SceneSpec]
    changed: tuple[int, ...]
    question: str
    answers: tuple[str, str]
    statements: tuple[str, str]


def orientation(studio: Studio) -> PairSpec:
    """One object faces left or right."""
    concept = studio.concept(lambda c: c.facing != "front", "a thing with a side that it faces")
    first = studio.place(concept, studio.cell(CELLS))
    second = dataclasses.replace(first, flip=not first.flip)
    sides = (table.facing_of(first), table.facing_of(second))
    return PairSpec(
        specs=_versions(studio, first, second, studio.bystanders(CELLS)),
        changed=(0,),
        question=f"Which way is the {concept.name} facing?",
        answers=sides,
        statements=_both("{} facing {}", concept.name, sides),
    )


def presence(studio: Studio) -> PairSpec:
    """One object is there or not."""
    concept = studio.concept(lambda c: True, "a thing")
    others = studio.bystanders(CELLS, fewest=1)
    item = studio.place(concept, studio.cell(CELLS))
    noun = phrases.indefinite(concept.name)
    return PairSpec(
        specs=(studio.scene([*others, item]), studio.scene(others)),
        changed=(len(others),),
        question=f"Is there {noun} in the picture?",
        answers=("yes", "no"),
        statements=(f"a scene with {noun}", f"a scene without {noun}"),
    )


def state(studio: Studio) -> PairSpec:
    """One object is open or closed, the right way up or upside down, solid or faded."""
    makers = [_faded]
    if any(c.facing != "front" for c in studio.vocabulary):
        makers.append(_upside_down)
    if any(_has_other(studio, c, "state") for c in studio.vocabulary):
        makers.append(_open_closed)
    return studio.draw.choice(makers)(studio)


def _faded(studio: Studio) -> PairSpec:
    concept = studio.concept(lambda c: True, "a thing")
    model = studio.place(concept, (0.5, 0.5))
    first = dataclasses.replace(model, size=studio.draw.uniform(*LARGE))
    second = dataclasses.replace(first, opacity=FADED_OPACITY)
    answers = ("solid", "faded")
    return PairSpec(
        specs=(studio.scene([first]), studio.scene([second])),
        changed=(0,),
        question=f"Is the {concept.name} solid or faded?",
        answers=answers,
        statements=tuple(phrases.indefinite(f"{answer} {concept.name}") for answer in answers),
    )


def _upside_down(studio: Studio) -> PairSpec:
    """Only of things drawn from the side: these have a clear way up."""
    concept = studio.concept(lambda c: c.facing != "front", "a thing with a side that it faces")
    first = studio.place(concept, studio.cell(CELLS))
    second = dataclasses.replace(first, angle=180.0)
    answers = ("the right way up", "upside down")
    return PairSpec(
        specs=_versions(studio, first, second, studio.bystanders(CELLS)),
        changed=(0,),
        question=f"Is the {concept.name} the right way up or upside down?",
        answers=answers,
        statements=_both("{} {}", concept.name, answers),
    )


def _open_closed(studio: Studio) -> PairSpec:
    concept = studio.concept(lambda c: _has_other(studio, c, "state"), "a thing in two states")
    other = table.by_name(concept.counterpart)
    first = studio.place(concept, studio.cell(CELLS))
    second = dataclasses.replace(first, concept=other.name)
    return PairSpec(
        specs=_versions(studio, first, second, studio.bystanders(CELLS)),
        changed=(0,),
        question=f"Is the {concept.kin} open or closed?",
        answers=(concept.state, other.state),
        statements=(phrases.indefinite(concept.name), phrases.indefinite(other.name)),
    )


def _has_other(studio: Studio, concept: Concept, kind: str) -> bool:
    """The concept is drawn in two states ("state") or from two viewpoints ("view")."""
    other = concept.counterpart and table.by_name(concept.counterpart)
    return bool(other) and getattr(concept, kind) is not None and other in studio.vocabulary


def count(studio: Studio) -> PairSpec:
    """One more or one fewer of a kind."""
    concept = studio.concept(lambda c: True, "a thing")
    number = studio.draw.randint(*COUNTS)
    model = studio.place(concept, studio.cell(CELLS))
    copies = [model, *(copy(model, studio.cell(CELLS)) for _ in range(number))]
    others = studio.bystanders(CELLS)
    numbers = (number, number + 1)
    return PairSpec(
        specs=(studio.scene([*others, *copies[:-1]]), studio.scene([*others, *copies])),
        changed=(len(others) + number,),
        question=f"How many {concept.plural} are there in the picture?",
        answers=(str(numbers[0]), str(numbers[1])),
        statements=tuple(phrases.number_of(n, concept.name, concept.plural) for n in numbers),
    )


def position(studio: Studio) -> PairSpec:
    """One object is on either side of another one, or of the canvas."""
    axis = studio.draw.choice(("x", "y"))
    concept = studio.concept(lambda c: True, "a thing")
    start, lane = _LANES[axis]
    first = studio.place(concept, start)
    second = dataclasses.replace(first, **{axis: 1.0 - getattr(first, axis)})
    if studio.draw.random() < 0.5 and len({c.kin for c in studio.vocabulary}) > 1:
        anchor = studio.concept(lambda c: True, "another thing")
        others = [studio.place(anchor, (0.5, 0.5))]
        noun, (question, answers) = anchor.name, _RELATIVE[axis]
        ends = tuple(f"{words} {phrases.indefinite(noun)}" for words in _RELATIONS[axis])
    else:
        others = studio.bystanders(lane)
        noun, (question, answers) = "", _ABSOLUTE[axis]
        ends = tuple(phrases.place((side,)) for side in answers)
    return PairSpec(
        specs=_versions(studio, first, second, others),
        changed=(0,),
        question=question.format(concept.name, noun),
        answers=answers,
        statements=_both("{} {}", concept.name, ends),
    )


_LANES = MappingProxyType(
    {
        "x": ((CENTRES[0], 0.5), tuple((0.5, y) for y in CENTRES)),
        "y": ((0.5, CENTRES[0]), tuple((x, 0.5) for x in CENTRES)),
    }
)
"""Axis → where the object starts, and the cells that it does not come near on either side."""
_RELATIONS = MappingProxyType({"x": ("to the left of", "to the right of"), "y": ("above", "below")})
_RELATIVE = MappingProxyType(
    {
        "x": ("Is the {} to the left or to the right of the {}?", ("left", "right")),
        "y": ("Is the {} above or below the {}?", ("above", "below")),
    }
)
_ABSOLUTE = MappingProxyType(
    {
        "x": ("Is the {} on the left or on the right of the picture?", ("left", "right")),
        "y": ("Is the {} at the top or at the bottom of the picture?", ("top", "bottom")),
    }
)


def colour(studio: Studio) -> PairSpec:
    """One object has one colour or another, of a pair that no one confuses."""
    concept = studio.concept(can_be_tinted, "a thing without a colour of its own")
    first_colour, *rest = studio.colours(len(palette.TINTS) - 2, palette.TINTS)
    other = next(c for c in rest if (first_colour, c) not in facts.ALIKE)
    model = studio.place(concept, studio.cell(CELLS))
    first, second = (dataclasses.replace(model, tint=tint) for tint in (first_colour, other))
    return PairSpec(
        specs=_versions(studio, first, second, studio.bystanders(CELLS)),
        changed=(0,),
        question=f"What colour is the {concept.name}?",
        answers=(first_colour, other),
        statements=tuple(
            phrases.indefinite(f"{tint} {concept.name}") for tint in (first_colour, other)
        ),
    )


def structure(studio: Studio) -> PairSpec:
    """A group of one kind is side by side, one above another, or in a circle."""
    concept = studio.concept(lambda c: True, "a thing")
    number = studio.draw.randint(*GROUP)
    (first, places), (second, other_places) = studio.draw.sample(list(_LAYOUTS.items()), 2)
    aspect = studio.aspect
    model = dataclasses.replace(
        studio.place(concept, (0.5, 0.5)), size=FILL * min(1.0 / number, _gap(number))
    )
    many = f"{phrases.NUMBERS[number]} {concept.plural}"
    return PairSpec(
        specs=(
            studio.scene([copy(model, at) for at in places(number, aspect)]),
            studio.scene([copy(model, at) for at in other_places(number, aspect)]),
        ),
        changed=tuple(range(number)),
        question=f"Are the {concept.plural} {first} or {second}?",
        answers=(first, second),
        statements=(f"{many} {first}", f"{many} {second}"),
    )


def _gap(number: int) -> float:
    """Distance of neighbours on the circle."""
    return 2.0 * RADIUS * math.sin(math.pi / number)


def _row(number: int, aspect: tuple[float, float]) -> list[Cell]:
    return [((k + 0.5) / number, 0.5) for k in range(number)]


def _column(number: int, aspect: tuple[float, float]) -> list[Cell]:
    return [(y, x) for x, y in _row(number, aspect)]


def _circle(number: int, aspect: tuple[float, float]) -> list[Cell]:
    """Starts at the top; `aspect` keeps it round on any canvas."""
    turns = [2.0 * math.pi * k / number for k in range(number)]
    return [
        (0.5 + RADIUS * math.sin(t) / aspect[0], 0.5 - RADIUS * math.cos(t) / aspect[1])
        for t in turns
    ]


_LAYOUTS: Mapping[str, Callable[[int, tuple[float, float]], list[Cell]]] = MappingProxyType(
    {"side by side": _row, "one above another": _column, "in a circle": _circle}
)


def text(studio: Studio) -> PairSpec:
    """One word is written or another."""
    size = studio.draw.uniform(*TEXT_SIZE)
    (ink,) = studio.colours(1, palette.NAMES)
    room = TEXT_ROOM * studio.aspect[0]
    words = [word for word in WORDS if text_extent(word, size)[0] <= room]
    first, second = studio.draw.sample(words, 2)
    y = studio.draw.choice((CENTRES[0], CENTRES[2]))
    concept = studio.concept(lambda c: True, "a thing")
    middle_row = tuple((x, 0.5) for x in CENTRES)
    shown = [studio.place(concept, studio.cell(middle_row)), *studio.bystanders(middle_row)]
    written = (DrawnText(text=word, x=0.5, y=y, size=size, colour=ink) for word in (first, second))
    return PairSpec(
        specs=tuple(studio.scene(shown, word) for word in written),
        changed=(),
        question="What word is written in the picture?",
        answers=(first, second),
        statements=(f'the word "{first}"', f'the word "{second}"'),
    )


def viewpoint(studio: Studio) -> PairSpec:
    """One object is close up or far away, seen from the side or from the front."""
    two_views = any(_has_other(studio, c, "view") for c in studio.vocabulary)
    return (_two_views if two_views and studio.draw.random() < 0.4 else _near_far)(studio)


def _near_far(studio: Studio) -> PairSpec:
    concept = studio.concept(lambda c: True, "a thing")
    model = studio.place(concept, (0.5, 0.5))
    near, far = (dataclasses.replace(model, size=studio.draw.uniform(*r)) for r in (NEAR, FAR))
    answers = ("close up", "far away")
    return PairSpec(
        specs=(studio.scene([near]), studio.scene([far])),
        changed=(0,),
        question=f"Is the {concept.name} close up or far away?",
        answers=answers,
        statements=_both("{} {}", concept.name, answers),
    )


def _two_views(studio: Studio) -> PairSpec:
    concept = studio.concept(
        lambda c: c.view == "side" and _has_other(studio, c, "view"), "a thing in two views"
    )
    first = studio.place(concept, studio.cell(CELLS))
    second = dataclasses.replace(first, concept=concept.counterpart)
    answers = ("from the side", "from the front")
    return PairSpec(
        specs=_versions(studio, first, second, studio.bystanders(CELLS)),
        changed=(0,),
        question=f"Is the {concept.name} seen from the side or from the front?",
        answers=answers,
        statements=_both("{} seen {}", concept.name, answers),
    )


def _versions(
    studio: Studio, first: Placement, second: Placement, others: Sequence[Placement]
) -> tuple[SceneSpec, SceneSpec]:
    """Two scenes with the same other things."""
    return studio.scene([first, *others]), studio.scene([second, *others])


def _both(form: str, name: str, ends: Sequence[str]) -> tuple[str, str]:
    """The form with "a {name}" and with each of the two ends."""
    noun = phrases.indefinite(name)
    return form.format(noun, ends[0]), form.format(noun, ends[1])


EDITS: Mapping[str, Callable[[Studio], PairSpec]] = MappingProxyType(
    {
        "orientation": orientation,
        "presence": presence,
        "state": state,
        "count": count,
        "position": position,
        "colour": colour,
        "structure": structure,
        "text": text,
        "viewpoint": viewpoint,
    }
)
"""Pattern → its maker, in the paper's order."""
