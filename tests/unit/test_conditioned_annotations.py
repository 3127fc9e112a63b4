"""Strata, marks and checks of evaluated images, and what a record becomes."""

from __future__ import annotations

import numpy as np
import pytest

from perception_jax.data.records import ObjectAnnotation, ObjectInstruction, Record
from perception_jax.errors import DataError
from perception_jax.evals.conditioned import prompts
from perception_jax.evals.conditioned.annotations import (
    STRATA,
    Annotations,
    EvaluatedClass,
)

NAMES = ("traffic_light", "Bead_(jewelry)", "cup", "dog")
CLASSES = tuple(EvaluatedClass(name=n, frequency=f) for n, f in zip(NAMES, "rcfr", strict=True))


def thing(class_id: int, area: float | None = None, **more: object) -> ObjectAnnotation:
    box = None if area is None else (0.0, 0.0, area, 1.0)
    return ObjectAnnotation(name=NAMES[class_id], box=box, **more)


def image(name: str, *objects: ObjectAnnotation, **more: object) -> Record:
    given = {"images": (np.zeros((2, 2, 3), np.uint8),), "size": (40, 25), "objects": objects}
    return Record(id=name, **(given | more))


def build(*images: Record, federated: bool, **options: object) -> Annotations:
    return Annotations.build(images, CLASSES, federated=federated, **options)


def strata(*objects: ObjectAnnotation, size=(40, 25)) -> dict[int, str | None]:
    pairs = build(image("0", *objects, size=size), federated=False).pairs
    return {
        int(c): STRATA[s] if s else None for c, s in zip(pairs.class_id, pairs.stratum, strict=True)
    }


def test_the_largest_object_is_salient_unless_it_is_small():
    assert strata(thing(0, 20.0), thing(1, 19.0)) == {0: "salient", 1: "overlooked"}
    assert strata(thing(0, 19.9), thing(1, 5.0)) == {0: "overlooked", 1: "overlooked"}
    # Equal areas: the first in the record, not the lower class.
    assert strata(thing(2, 50.0), thing(0, 50.0)) == {2: "salient", 0: "overlooked"}
    # A pair stands for the largest box of its class.
    assert strata(thing(0, 5.0), thing(1, 60.0), thing(0, 90.0)) == {0: "salient", 1: "overlooked"}


def test_without_a_box_or_a_size_a_stratum_is_unknown():
    assert strata(thing(0), thing(1, 30.0)) == {0: None, 1: "salient"}
    assert strata(thing(0, 40.0), thing(1, 30.0), size=None) == {0: None, 1: "overlooked"}


def test_a_mark_replaces_the_largest_but_not_the_smallest_share():
    marked = strata(thing(0, 90.0, salient=False), thing(1, 30.0, salient=True))
    assert marked == {0: "overlooked", 1: "salient"}
    assert strata(thing(0, 90.0, salient=False), thing(1, 19.0, salient=True))[1] == "overlooked"
    assert strata(thing(0, 90.0, salient=False))[0] == "overlooked"
    assert strata(thing(0, salient=True), thing(1, 9.0, salient=False))[0] is None


def test_what_is_known_of_an_image():
    lists = {"absent": (NAMES[1], NAMES[0], "cow"), "not_exhaustive": (NAMES[2], NAMES[0], "cow")}
    one = image("7", thing(0), **lists)
    labels = {f: build(one, federated=f).labels[0].tolist() for f in (True, False)}
    assert labels[True] == [1, 0, -1, -1]  # annotated beats both lists
    assert labels[False] == [1, 0, -1, 0]


def test_what_is_not_shown_and_crowds_are_left_out_and_their_classes_unknown():
    one = image("7", thing(0), thing(0), thing(3), thing(2, crowd=True), absent=NAMES[1:])
    mask = np.array([True, False, False, True])
    for federated, expected in ((False, [1, 0, -1, -1]), (True, [1, 0, -1, -1])):
        notes = build(one, federated=federated, shown=lambda record: mask)
        assert notes.labels[0].tolist() == expected  # a class that was cut away is not absent
        assert notes.cropped == 2  # the crowd is none of them


def test_a_data_set_that_cannot_be_evaluated_is_refused():
    with pytest.raises(DataError, match="'3' twice"):
        build(image("3"), image("3"), federated=True)
    with pytest.raises(DataError, match="found 0 images and 4 classes"):
        build(federated=True)


def test_captions_and_instructions_of_a_record():
    cup = thing(2, 9.0, captions=("a blue cup", "it is full"))
    cow = ObjectAnnotation(name="cow", box=(0.0, 0.0, 9.0, 9.0), captions=("a cow",))
    instructions = (
        ObjectInstruction(text="nothing", target=None),
        ObjectInstruction(text="the cow", target=0),
        ObjectInstruction(text="the blue cup", target=1),
        ObjectInstruction(text="not this", target=1),
    )
    one = image("8", cow, cup, thing(0, captions=("a light",)), instructions=instructions)
    notes = build(one, image("9", thing(2, captions=("again",))), federated=True)
    assert notes.instructions == (
        "the traffic light",
        "the bead",
        "the cup",
        "the dog",
        "the blue cup",
    )
    pairs, captions = notes.pairs, notes.captions
    assert pairs.image.tolist() == [0, 0, 1]
    assert pairs.class_id.tolist() == [0, 2, 2]
    assert [notes.instructions[k] for k in pairs.instruction[1:]] == ["the blue cup", "the cup"]
    assert captions.texts == ("a blue cup", "it is full", "a light", "again")
    assert captions.pair.tolist() == [1, 1, 0, 2]


def test_equal_boxes_have_equal_areas_wherever_they_are():
    first = ObjectAnnotation(name=NAMES[0], box=(0.0, 0.0, 3.0, 4.0))
    second = ObjectAnnotation(name=NAMES[1], box=(1.1, 2.0, 4.1, 6.0))
    assert 4.1 - 1.1 != 3.0
    assert strata(first, second, size=(10, 10)) == {0: "salient", 1: "overlooked"}
    assert strata(second, first, size=(10, 10)) == {0: "overlooked", 1: "salient"}


def test_prototypes_of_names_that_clean_alike_are_one():
    asked = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.eye(len(texts))

    rows = prompts.prototypes(encode, ["crab_(animal)", "Cup", "crab"])
    assert len(asked) == len(set(asked)) == 6
    np.testing.assert_array_equal(rows[0], rows[2])
    assert rows[0] @ rows[1] == 0
