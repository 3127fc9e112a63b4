"""Edits of a spec in one respect: the nine visual patterns of MMVP (arXiv 2401.06209, §2).

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
from perception_jax.data.scenes.pair_layout import CELLS, CENTRES, Cell, PairLayout, copy
from perception_jax.data.scenes.sample import can_be_tinted
from perception_jax.data.scenes.spec import DrawnText, Placement, SceneSpec
from perception_jax.data.scenes.visibility import text_extent
from perception_jax.data.scenes.words import WORDS

COUNTS = (1, 4)
"""Range of the smaller number of a count pair."""
GROUP = (4, 6)
"""Range of the number of objects in a structure pair."""
RADIUS = 0.34
"""Radius of a circle of objects, in shorter sides of the canvas."""
FILL = 0.85
"""Size of the objects of a group, as a fraction of their distance."""
NEAR, FAR = (0.75, 0.9), (0.12, 0.18)
"""Sizes in a viewpoint pair."""
LARGE = (0.5, 0.75)
"""Sizes of an object that may be faded; small ones cannot be distinguished from solid ones."""
FADED_OPACITY = 0.55
"""Opacity of a faded object."""
TEXT_SIZE = (0.14, 0.2)
"""Range of text heights, in shorter sides of the canvas."""
MAX_TEXT_WIDTH = 0.94
"""Width of the widest word, as a fraction of the canvas."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PairSpec:
    """Two specs that differ in one respect, and texts that distinguish them.

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


def orientation(layout: PairLayout) -> PairSpec:
    """One object faces left or right."""
    concept = layout.concept(lambda c: c.facing != "front", "a thing with a side that it faces")
    first = layout.place(concept, layout.cell(CELLS))
    second = dataclasses.replace(first, flip=not first.flip)
    sides = (table.facing_of(first), table.facing_of(second))
    return PairSpec(
        specs=_versions(layout, first, second, layout.bystanders(CELLS)),
        changed=(0,),
        question=f"Which way is the {concept.name} facing?",
        answers=sides,
        statements=_both("{} facing {}", concept.name, sides),
    )


def presence(layout: PairLayout) -> PairSpec:
    """One object is present or absent."""
    concept = layout.concept(lambda c: True, "a thing")
    others = layout.bystanders(CELLS, fewest=1)
    item = layout.place(concept, layout.cell(CELLS))
    noun = phrases.indefinite(concept.name)
    return PairSpec(
        specs=(layout.scene([*others, item]), layout.scene(others)),
        changed=(len(others),),
        question=f"Is there {noun} in the picture?",
        answers=("yes", "no"),
        statements=(f"a scene with {noun}", f"a scene without {noun}"),
    )


def state(layout: PairLayout) -> PairSpec:
    """One object is open or closed, upright or upside down, solid or faded."""
    makers = [_faded]
    if any(c.facing != "front" for c in layout.vocabulary):
        makers.append(_upside_down)
    if any(_has_other(layout, c, "state") for c in layout.vocabulary):
        makers.append(_open_closed)
    return layout.draw.choice(makers)(layout)


def _faded(layout: PairLayout) -> PairSpec:
    concept = layout.concept(lambda c: True, "a thing")
    model = layout.place(concept, (0.5, 0.5))
    first = dataclasses.replace(model, size=layout.draw.uniform(*LARGE))
    second = dataclasses.replace(first, opacity=FADED_OPACITY)
    answers = ("solid", "faded")
    return PairSpec(
        specs=(layout.scene([first]), layout.scene([second])),
        changed=(0,),
        question=f"Is the {concept.name} solid or faded?",
        answers=answers,
        statements=_adjectives(answers, concept.name),
    )


def _upside_down(layout: PairLayout) -> PairSpec:
    """Only of things drawn from the side: these have a clear way up."""
    concept = layout.concept(lambda c: c.facing != "front", "a thing with a side that it faces")
    first = layout.place(concept, layout.cell(CELLS))
    second = dataclasses.replace(first, angle=180.0)
    answers = ("the right way up", "upside down")
    return PairSpec(
        specs=_versions(layout, first, second, layout.bystanders(CELLS)),
        changed=(0,),
        question=f"Is the {concept.name} the right way up or upside down?",
        answers=answers,
        statements=_both("{} {}", concept.name, answers),
    )


def _open_closed(layout: PairLayout) -> PairSpec:
    concept = layout.concept(lambda c: _has_other(layout, c, "state"), "a thing in two states")
    other = table.by_name(concept.counterpart)
    first = layout.place(concept, layout.cell(CELLS))
    second = dataclasses.replace(first, concept=other.name)
    return PairSpec(
        specs=_versions(layout, first, second, layout.bystanders(CELLS)),
        changed=(0,),
        question=f"Is the {concept.family} open or closed?",
        answers=(concept.state, other.state),
        statements=(phrases.indefinite(concept.name), phrases.indefinite(other.name)),
    )


def _has_other(layout: PairLayout, concept: Concept, kind: str) -> bool:
    """The concept is drawn in two states ("state") or from two viewpoints ("view")."""
    other = concept.counterpart and table.by_name(concept.counterpart)
    return bool(other) and getattr(concept, kind) is not None and other in layout.vocabulary


def count(layout: PairLayout) -> PairSpec:
    """One more or one fewer of the same objects."""
    concept = layout.concept(lambda c: True, "a thing")
    number = layout.draw.randint(*COUNTS)
    model = layout.place(concept, layout.cell(CELLS))
    copies = [model, *(copy(model, layout.cell(CELLS)) for _ in range(number))]
    others = layout.bystanders(CELLS)
    numbers = (number, number + 1)
    return PairSpec(
        specs=(layout.scene([*others, *copies[:-1]]), layout.scene([*others, *copies])),
        changed=(len(others) + number,),
        question=f"How many {concept.plural} are there in the picture?",
        answers=(str(numbers[0]), str(numbers[1])),
        statements=tuple(phrases.number_of(n, concept.name, concept.plural) for n in numbers),
    )


def position(layout: PairLayout) -> PairSpec:
    """One object is on either side of another one, or of the canvas."""
    axis = layout.draw.choice(("x", "y"))
    concept = layout.concept(lambda c: True, "a thing")
    start, lane = _LANES[axis]
    first = layout.place(concept, start)
    second = dataclasses.replace(first, **{axis: 1.0 - getattr(first, axis)})
    if layout.draw.random() < 0.5 and len({c.family for c in layout.vocabulary}) > 1:
        anchor = layout.concept(lambda c: True, "another thing")
        others = [layout.place(anchor, (0.5, 0.5))]
        relations, question, answers = phrases.RELATION_QUESTIONS[axis]
        question = question.format(f"the {concept.name}", f"the {anchor.name}")
        ends = tuple(f"{words} {phrases.indefinite(anchor.name)}" for words in relations)
    else:
        others = layout.bystanders(lane)
        question, answers = phrases.SIDE_QUESTIONS[axis]
        question = question.format(f"the {concept.name}")
        ends = tuple(phrases.place((side,)) for side in answers)
    return PairSpec(
        specs=_versions(layout, first, second, others),
        changed=(0,),
        question=question,
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


def colour(layout: PairLayout) -> PairSpec:
    """One object has one colour or another, of a pair that no one confuses."""
    concept = layout.concept(can_be_tinted, "a thing without a colour of its own")
    first_colour, *rest = layout.colours(len(palette.TINTS) - 2, palette.TINTS)
    other = next(c for c in rest if (first_colour, c) not in facts.ALIKE)
    model = layout.place(concept, layout.cell(CELLS))
    first, second = (dataclasses.replace(model, tint=tint) for tint in (first_colour, other))
    return PairSpec(
        specs=_versions(layout, first, second, layout.bystanders(CELLS)),
        changed=(0,),
        question=f"What colour is the {concept.name}?",
        answers=(first_colour, other),
        statements=_adjectives((first_colour, other), concept.name),
    )


def structure(layout: PairLayout) -> PairSpec:
    """A group of equal objects is side by side, one above another, or in a circle."""
    concept = layout.concept(lambda c: True, "a thing")
    number = layout.draw.randint(*GROUP)
    (first, places), (second, other_places) = layout.draw.sample(list(_LAYOUTS.items()), 2)
    aspect = layout.aspect
    model = dataclasses.replace(
        layout.place(concept, (0.5, 0.5)), size=FILL * min(1.0 / number, _gap(number))
    )
    many = f"{phrases.NUMBERS[number]} {concept.plural}"
    return PairSpec(
        specs=(
            layout.scene([copy(model, at) for at in places(number, aspect)]),
            layout.scene([copy(model, at) for at in other_places(number, aspect)]),
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


def text(layout: PairLayout) -> PairSpec:
    """The drawn word differs."""
    size = layout.draw.uniform(*TEXT_SIZE)
    (ink,) = layout.colours(1, palette.NAMES)
    widest = MAX_TEXT_WIDTH * layout.aspect[0]
    words = [word for word in WORDS if text_extent(word, size)[0] <= widest]
    first, second = layout.draw.sample(words, 2)
    y = layout.draw.choice((CENTRES[0], CENTRES[2]))
    concept = layout.concept(lambda c: True, "a thing")
    middle_row = tuple((x, 0.5) for x in CENTRES)
    shown = [layout.place(concept, layout.cell(middle_row)), *layout.bystanders(middle_row)]
    written = (DrawnText(text=word, x=0.5, y=y, size=size, colour=ink) for word in (first, second))
    return PairSpec(
        specs=tuple(layout.scene(shown, word) for word in written),
        changed=(),
        question="What word is written in the picture?",
        answers=(first, second),
        statements=(f'the word "{first}"', f'the word "{second}"'),
    )


def viewpoint(layout: PairLayout) -> PairSpec:
    """One object is close up or far away, seen from the side or from the front."""
    two_views = any(_has_other(layout, c, "view") for c in layout.vocabulary)
    return (_two_views if two_views and layout.draw.random() < 0.4 else _near_far)(layout)


def _near_far(layout: PairLayout) -> PairSpec:
    concept = layout.concept(lambda c: True, "a thing")
    model = layout.place(concept, (0.5, 0.5))
    near, far = (dataclasses.replace(model, size=layout.draw.uniform(*r)) for r in (NEAR, FAR))
    answers = ("close up", "far away")
    return PairSpec(
        specs=(layout.scene([near]), layout.scene([far])),
        changed=(0,),
        question=f"Is the {concept.name} close up or far away?",
        answers=answers,
        statements=_both("{} {}", concept.name, answers),
    )


def _two_views(layout: PairLayout) -> PairSpec:
    concept = layout.concept(
        lambda c: c.view == "side" and _has_other(layout, c, "view"), "a thing in two views"
    )
    first = layout.place(concept, layout.cell(CELLS))
    second = dataclasses.replace(first, concept=concept.counterpart)
    answers = ("from the side", "from the front")
    return PairSpec(
        specs=_versions(layout, first, second, layout.bystanders(CELLS)),
        changed=(0,),
        question=f"Is the {concept.name} seen from the side or from the front?",
        answers=answers,
        statements=_both("{} seen {}", concept.name, answers),
    )


def _versions(
    layout: PairLayout, first: Placement, second: Placement, others: Sequence[Placement]
) -> tuple[SceneSpec, SceneSpec]:
    """Two scenes with the same other things."""
    return layout.scene([first, *others]), layout.scene([second, *others])


def _adjectives(words: Sequence[str], name: str) -> tuple[str, str]:
    """ "a {word} {name}" for each of two words."""
    return phrases.indefinite(f"{words[0]} {name}"), phrases.indefinite(f"{words[1]} {name}")


def _both(form: str, name: str, ends: Sequence[str]) -> tuple[str, str]:
    """The form with "a {name}" and with each of the two ends."""
    noun = phrases.indefinite(name)
    return form.format(noun, ends[0]), form.format(noun, ends[1])


_ALL = (orientation, presence, state, count, position, colour, structure, text, viewpoint)
EDITS: Mapping[str, Callable[[PairLayout], PairSpec]] = MappingProxyType(
    {edit.__name__: edit for edit in _ALL}
)
"""Functions that make pairs by pattern, in the paper's order."""
