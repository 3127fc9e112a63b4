"""Describes a rendered scene: captions, phrases, questions, instructions.

All of it follows from `facts`, so all of it is true. Object captions come with and without the
class name, because a caption that repeats the instruction's class name can be matched without
looking. Instructions have the forms of `data.instructions.FORMS`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from perception_jax.data.instructions import FORMS
from perception_jax.data.records import ObjectInstruction, Question, ReferringExpression
from perception_jax.data.scenes import captions
from perception_jax.data.scenes.concepts import Concept
from perception_jax.data.scenes.facts import SceneFacts
from perception_jax.data.scenes.questions import questions
from perception_jax.data.scenes.referring import Reference, references

ABSENT_NAMES = 8
"""Largest number of absent names of a scene."""
ABSENT_INSTRUCTIONS = 2
"""Number of instructions for absent objects."""
REFERRING_PER_OBJECT = 2
"""Largest number of referring expressions of an object."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """Texts of a scene; indices refer to the clearly visible objects.

    Attributes:
      captions: of the whole image; all but the last one with class names.
      object_captions: per object, one with its class name and one without.
      referring: none for an object that no phrase picks out beyond dispute.
      absent: class names that nothing in the image could go by.
    """

    captions: tuple[str, ...] = ()
    object_captions: tuple[tuple[str, str], ...] = ()
    referring: tuple[ReferringExpression, ...] = ()
    questions: tuple[Question, ...] = ()
    instructions: tuple[ObjectInstruction, ...] = ()
    absent: tuple[str, ...] = ()


def describe(
    scene: SceneFacts, rng: np.random.Generator, vocabulary: Sequence[Concept]
) -> Description:
    """Describes a scene; the same scene and generator state give the same words.

    Args:
      scene: what `facts.observe` found in the rendered scene.
      vocabulary: concepts that may be spoken of as absent or offered as a wrong answer.
    """
    draw = random.Random(int(rng.integers(2**63)))
    refs = references(scene, draw)
    absent = absent_concepts(scene, vocabulary, draw)
    return Description(
        captions=tuple(captions.scene_captions(scene, draw)),
        object_captions=tuple(captions.object_captions(item, draw) for item in scene.objects),
        referring=tuple(_expressions(refs, draw)),
        questions=tuple(questions(scene, refs, absent, draw)),
        instructions=tuple(_instructions(refs, absent, draw)),
        absent=tuple(concept.name for concept in absent),
    )


def caption(scene: SceneFacts, rng: np.random.Generator, *, facts: bool = False) -> Description:
    """Returns only the captions of the image, as contrastive training needs.

    Args:
      facts: whether a fourth one states a single fact, where one is certain.
    """
    draw = random.Random(int(rng.integers(2**63)))
    found = captions.scene_captions(scene, draw)
    fact = captions.fact_caption(scene, draw) if facts else ""
    return Description(captions=(*found, fact) if fact else tuple(found))


def absent_concepts(
    scene: SceneFacts, vocabulary: Sequence[Concept], draw: random.Random
) -> list[Concept]:
    """Returns up to `ABSENT_NAMES` concepts whose names apply to nothing in the image."""
    written = scene.text.text.lower() if scene.text else None
    candidates = draw.sample(vocabulary, min(len(vocabulary), 2 * ABSENT_NAMES))
    absent = [c for c in candidates if c.name != written and scene.absent(c)]
    return absent[:ABSENT_NAMES]


def _expressions(
    refs: Sequence[Sequence[Reference]], draw: random.Random
) -> list[ReferringExpression]:
    chosen = []
    for found in refs:
        chosen += draw.sample(found, min(len(found), REFERRING_PER_OBJECT))
    return [ReferringExpression(text=ref.text, target=ref.target) for ref in chosen]


def _instructions(
    refs: Sequence[Sequence[Reference]], absent: Sequence[Concept], draw: random.Random
) -> list[ObjectInstruction]:
    """One for each object that can be picked out by its name, and some for absent ones."""
    made = []
    for found in refs:
        named = [ref for ref in found if "name" in ref.uses]
        if named:
            ref = draw.choice(named)
            # A longer phrase is not an instruction by itself.
            forms = FORMS if ref.uses == {"name"} else [form for form in FORMS if form != "{}"]
            text = draw.choice(forms).format(ref.text.removeprefix("the "))
            made.append(ObjectInstruction(text=text, target=ref.target))
    for concept in draw.sample(absent, min(len(absent), ABSENT_INSTRUCTIONS)):
        made.append(ObjectInstruction(text=draw.choice(FORMS).format(concept.name), target=None))
    return made
