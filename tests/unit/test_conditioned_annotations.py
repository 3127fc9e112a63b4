"""Strata, marks and checks of evaluated images, and what a record becomes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from perception_jax.data.moinst.record import from_json
from perception_jax.data.records import ObjectAnnotation, ObjectInstruction, Record
from perception_jax.errors import DataError
from perception_jax.evals.conditioned import convert, prompts
from perception_jax.evals.conditioned.annotations import (
    STRATA,
    Annotations,
    EvaluatedClass,
    EvaluatedImage,
    EvaluatedObject,
)

NAMES = ("traffic_light", "Bead_(jewelry)", "cup", "dog")
CLASSES = tuple(EvaluatedClass(name=n, frequency=f) for n, f in zip(NAMES, "rcfr", strict=True))


def thing(class_id: int, area: float | None = None, **more: object) -> EvaluatedObject:
    return EvaluatedObject(class_id=class_id, area=area, **more)


def image(name: int, *objects: EvaluatedObject, **more: object) -> EvaluatedImage:
    return EvaluatedImage(**({"id": name, "area": 1000.0, "objects": objects} | more))


def strata(*objects: EvaluatedObject, area: float | None = 1000.0) -> dict[int, str | None]:
    notes = Annotations.build([image(0, *objects, area=area)], CLASSES, federated=False)
    pairs = notes.pairs
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
    assert strata(thing(0, 40.0), thing(1, 30.0), area=None) == {0: None, 1: "overlooked"}


def test_a_mark_replaces_the_largest_but_not_the_smallest_share():
    marked = strata(thing(0, 90.0, salient=False), thing(1, 30.0, salient=True))
    assert marked == {0: "overlooked", 1: "salient"}
    assert strata(thing(0, 90.0, salient=False), thing(1, 19.0, salient=True))[1] == "overlooked"
    assert strata(thing(0, 90.0, salient=False))[0] == "overlooked"
    assert strata(thing(0, salient=True), thing(1, 9.0, salient=False))[0] is None


def test_what_is_known_of_an_image():
    one = image(7, thing(0), negative=(1, 0), nonexhaustive=(2, 0))
    labels = {f: Annotations.build([one], CLASSES, federated=f).labels[0] for f in (True, False)}
    assert labels[True].tolist() == [1, 0, -1, -1]  # annotated beats both lists
    assert labels[False].tolist() == [1, 0, -1, 0]
    cropped = image(7, thing(0), thing(0), thing(3), negative=(1,)).keep([True, False, False])
    notes = Annotations.build([cropped], CLASSES, federated=False)
    assert notes.labels[0].tolist() == [1, 0, 0, -1]  # a class that was cut away is not absent


def test_a_data_set_that_does_not_fit_its_classes_is_refused():
    with pytest.raises(DataError, match=r"image 'a'.*\[0, 4\), found 4"):
        Annotations.build([image("a", negative=(4,))], CLASSES, federated=True)
    with pytest.raises(DataError, match="3 twice"):
        Annotations.build([image(3), image(3)], CLASSES, federated=True)


def test_a_record_and_its_canonical_line_agree():
    line = {
        "image_id": "8",
        "file": "8.jpg",
        "width": 40,
        "height": 25,
        "objects": [
            {
                "class": "cup",
                "class_id": 2,
                "captions": ["a blue cup", "it is full"],
                "instruction": "the blue cup",
                "bbox": [1.1, 2.0, 3.0, 4.0],
                "salient": True,
            },
            {"class": "traffic_light", "class_id": 0, "captions": [], "salient": False},
        ],
        "neg_class_ids": [1],
        "nonexhaustive_class_ids": [0],
    }
    theirs = convert.from_moinst(from_json(line, "line"))
    record = Record(
        id="8",
        images=(np.zeros((2, 2, 3), np.uint8),),
        objects=(
            ObjectAnnotation(
                name="cup",
                box=(1.1, 2.0, 4.1, 6.0),
                captions=("a blue cup", "it is full"),
                salient=True,
            ),
            ObjectAnnotation(name="cow", box=(0.0, 0.0, 1.0, 1.0)),
            ObjectAnnotation(name="dog", box=(0.0, 0.0, 1.0, 1.0), crowd=True),
            ObjectAnnotation(name="light", box=None, salient=False),
        ),
        instructions=(
            ObjectInstruction(text="the blue cup", target=0),
            ObjectInstruction(text="not this", target=0),
            ObjectInstruction(text="nothing", target=None),
        ),
        absent=("bead", "cow"),
        not_exhaustive=("light",),
    )
    kinds = {"light": 0, "bead": 1, "cup": 2, "dog": 3}
    ours = convert.from_record(record, kinds, (40, 25))
    assert ours == dataclasses.replace(theirs, nonexhaustive=(0, 3))  # the crowd of dogs
    assert 4.1 - 1.1 != 3.0  # and yet the areas are equal
    notes = Annotations.build([ours], CLASSES, federated=True)
    assert notes.instructions[:2] == ("the traffic light", "the bead")
    assert notes.instructions[notes.pairs.instruction[1]] == "the blue cup"


def test_prototypes_of_names_that_clean_alike_are_one():
    asked = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.extend(texts)
        return np.eye(len(texts))

    rows = prompts.prototypes(encode, ["crab_(animal)", "Cup", "crab"])
    assert len(asked) == len(set(asked)) == 6
    np.testing.assert_array_equal(rows[0], rows[2])
    assert rows[0] @ rows[1] == 0
