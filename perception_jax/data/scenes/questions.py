"""Questions about a scene that cannot be answered without the image.

For each kind the scene's draw decides first what the answer should be, as far as the scene allows,
and then what to ask; two-option questions offer their options in random order. Over many scenes no
answer of a kind is the right one in most of its questions.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Sequence

from perception_jax.data.records import Question
from perception_jax.data.scenes import facts, palette, phrases
from perception_jax.data.scenes.concepts import Concept
from perception_jax.data.scenes.facts import SceneFacts
from perception_jax.data.scenes.referring import Reference
from perception_jax.data.scenes.words import WORDS

TWO_OPTION_SHARE = 0.5
"""Share of questions with two options."""
LETTERS = ("(a)", "(b)")
"""Letters of two options."""

CATEGORY_ANSWERS = {
    "animal": "an animal",
    "plant": "a plant",
    "vehicle": "a vehicle",
    "food": "something to eat or drink",
}
"""Answers by category."""
PRESENCE_FORMS = (
    "Is there {} in the picture?",
    "Can you see {} in the picture?",
    "Does the picture show {}?",
)
"""Templates of questions about presence."""


def prompt(question: Question) -> str:
    """Formats a question for a model: "… (a) left (b) right" if it has options."""
    offered = zip(LETTERS, question.options, strict=False)
    return " ".join([question.text, *(f"{letter} {option}" for letter, option in offered)])


def letter(question: Question) -> str:
    """ "(a)" or "(b)", whichever option is right; "" for an open question."""
    return LETTERS[question.options.index(question.answer)] if question.options else ""


@dataclasses.dataclass(frozen=True, slots=True)
class _Draft:
    text: str
    answer: str
    wrong: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Asker:
    """Inputs of the question functions: the scene, phrases for its objects, absent concepts."""

    scene: SceneFacts
    refs: Sequence[Sequence[Reference]]
    absent: Sequence[Concept]
    draw: random.Random

    def subject(self, target: int, *hidden: str) -> str | None:
        """A phrase for an object that gives none of `hidden` away; by name if possible."""
        fitting = [ref for ref in self.refs[target] if ref.uses.isdisjoint(hidden)]
        named = [ref for ref in fitting if "name" in ref.uses]
        return self.draw.choice(named or fitting).text if fitting else None

    def objects(self) -> list[int]:
        """All objects in random order."""
        return self.draw.sample(range(len(self.scene.objects)), len(self.scene.objects))

    def coin(self) -> bool:
        return self.draw.random() < 0.5


def questions(
    scene: SceneFacts,
    refs: Sequence[Sequence[Reference]],
    absent: Sequence[Concept],
    draw: random.Random,
) -> list[Question]:
    """Returns at most one question of each kind in `KINDS`.

    Args:
      refs: for each object, phrases that pick it out.
      absent: concepts that are certainly not in the image.
    """
    asker = _Asker(scene, refs, absent, draw)
    made = []
    for kind, make in KINDS.items():
        if draft := make(asker):
            made.append(_finished(kind, draft, draw))
    return made


def _finished(kind: str, draft: _Draft, draw: random.Random) -> Question:
    options: tuple[str, ...] = ()
    if draw.random() < TWO_OPTION_SHARE:
        options = tuple(draw.sample((draft.answer, draft.wrong), 2))
    return Question(text=draft.text, answers=(draft.answer,), options=options, kind=kind)


def _yes_no(text: str, yes: bool) -> _Draft:
    return _Draft(text, "yes", "no") if yes else _Draft(text, "no", "yes")


def _presence(asker: _Asker) -> _Draft | None:
    if not asker.scene.objects or not asker.absent:
        return None
    yes = asker.coin()
    concept = (
        asker.draw.choice(asker.scene.objects).concept if yes else asker.draw.choice(asker.absent)
    )
    form = asker.draw.choice(PRESENCE_FORMS)
    return _yes_no(form.format(phrases.indefinite(concept.name)), yes)


def _count(asker: _Asker) -> _Draft | None:
    things: dict[int, list[str]] = {}
    for plural, count in _counted(asker):
        if count is not None:
            things.setdefault(count, []).append(plural)
    if not things:
        return None
    count = asker.draw.choice(sorted(things))
    plural = asker.draw.choice(things[count])
    wrong = count + 1 if count == 0 or asker.coin() else count - 1
    return _Draft(f"How many {plural} are there in the picture?", str(count), str(wrong))


def _counted(asker: _Asker) -> list[tuple[str, int | None]]:
    """What can be counted, and how many there are (None if unclear)."""
    scene = asker.scene
    concepts = {item.name: item.concept for item in scene.objects}.values()
    counted = [(concept.plural, scene.count(concept)) for concept in concepts]
    if asker.absent:
        counted.append((asker.draw.choice(asker.absent).plural, 0))
    for category, (_, plural) in phrases.CATEGORY_NOUNS.items():
        counted.append((plural, scene.count_category(category)))
    return counted


def _colour(asker: _Asker) -> _Draft | None:
    for k in asker.objects():
        item = asker.scene.objects[k]
        subject = asker.subject(k, "colour") if phrases.colour_fits(item) else None
        if subject:
            others = [c for c in palette.NAMES if facts.has_colour(item, c) is False]
            return _Draft(f"What colour is {subject}?", item.colour, asker.draw.choice(others))
    return None


def _compared(
    asker: _Asker,
    *,
    hidden: Sequence[str],
    make: Callable[[_Asker, int, int, str, str], _Draft | None],
) -> _Draft | None:
    """The first question that can be made about two objects."""
    order = asker.objects()
    for first, second in itertools.pairwise(order):
        subject, other = asker.subject(first, *hidden), asker.subject(second, *hidden)
        if subject and other and (draft := make(asker, first, second, subject, other)):
            return draft
    return None


def _size_draft(asker: _Asker, first: int, second: int, subject: str, other: str) -> _Draft | None:
    claim = facts.bigger(asker.scene.objects[first], asker.scene.objects[second])
    if claim is None:
        return None
    if asker.coin():
        text = f"Is {subject} bigger or smaller than {other}?"
        return _Draft(text, *(("bigger", "smaller") if claim else ("smaller", "bigger")))
    word, right = ("bigger", claim) if asker.coin() else ("smaller", not claim)
    answers = (subject, other) if right else (other, subject)
    return _Draft(f"Which is {word}, {subject} or {other}?", *answers)


def _relation_draft(
    asker: _Asker, first: int, second: int, subject: str, other: str
) -> _Draft | None:
    words = facts.relation(asker.scene.objects[first], asker.scene.objects[second])
    for relations, text, answers in phrases.RELATION_QUESTIONS.values():
        if words in relations:
            right = relations.index(words)
            return _Draft(text.format(subject, other), answers[right], answers[1 - right])
    return None


def _position(asker: _Asker) -> _Draft | None:
    for k in asker.objects():
        item = asker.scene.objects[k]
        clear = [side for side in (item.horizontal, item.vertical) if side]
        subject = asker.subject(k, "place", "relation")
        if clear and subject:
            side = asker.draw.choice(clear)
            text, sides = phrases.SIDE_QUESTIONS["x" if side == item.horizontal else "y"]
            return _Draft(text.format(subject), side, sides[1 - sides.index(side)])
    return None


def _facing(asker: _Asker) -> _Draft | None:
    wanted = asker.draw.choice(("left", "right"))
    sided = [k for k in asker.objects() if asker.scene.objects[k].facing != "front"]
    sided.sort(key=lambda k: asker.scene.objects[k].facing != wanted)
    for k in sided:
        if subject := asker.subject(k, "facing"):
            side = asker.scene.objects[k].facing
            if asker.coin():
                return _yes_no(f"Is {subject} facing {wanted}?", side == wanted)
            other = "right" if side == "left" else "left"
            return _Draft(f"Which way is {subject} facing?", side, other)
    return None


def _text(asker: _Asker) -> _Draft | None:
    written = asker.scene.text
    if written is None:
        return None
    wrong = asker.draw.choice([word for word in WORDS if word != written.text])
    if asker.coin():
        yes = asker.coin()
        word = written.text if yes else wrong
        return _yes_no(f'Is the word "{word}" written in the picture?', yes)
    return _Draft("What word is written in the picture?", written.text, wrong)


def _category(asker: _Asker) -> _Draft | None:
    for k in asker.objects():
        concept = asker.scene.objects[k].concept
        subject = asker.subject(k, "name", "category")
        if subject and concept.category in CATEGORY_ANSWERS:
            wrong = [
                answer
                for category, answer in CATEGORY_ANSWERS.items()
                if facts.of_category(concept, category) is False
            ]
            text = f"What kind of thing is {_one(subject)}?"
            return _Draft(text, CATEGORY_ANSWERS[concept.category], asker.draw.choice(wrong))
    return None


def _name(asker: _Asker) -> _Draft | None:
    for k in asker.objects():
        item = asker.scene.objects[k]
        subject = asker.subject(k, "name")
        others = [other.name for other in asker.scene.objects if other.name != item.name]
        others += [concept.name for concept in asker.absent]
        if subject and others:
            text = f"What is {_shown(subject)}?"
            return _Draft(text, item.name, asker.draw.choice(others))
    return None


def _one(subject: str) -> str:
    """ "the red thing" → "the red one"; the only thing there is → "shown"."""
    return "shown" if subject == "the thing" else subject.replace(" thing", " one", 1)


def _shown(subject: str) -> str:
    return "shown" if subject == "the thing" else subject


KINDS: dict[str, Callable[[_Asker], _Draft | None]] = {
    "presence": _presence,
    "count": _count,
    "colour": _colour,
    "size": functools.partial(_compared, hidden=("size",), make=_size_draft),
    "position": _position,
    "relation": functools.partial(_compared, hidden=("place", "relation"), make=_relation_draft),
    "facing": _facing,
    "text": _text,
    "category": _category,
    "name": _name,
}
"""Functions that draft questions, by kind."""
