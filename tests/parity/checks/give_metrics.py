"""Golden check of GiVE's evaluation: every number, on given embeddings and presence logits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from perception_jax.data.moinst.names import clean_name
from perception_jax.data.moinst.record import MoinstImage, from_json
from perception_jax.data.records import ObjectAnnotation, ObjectInstruction, Record
from perception_jax.evals.conditioned import prompts
from perception_jax.evals.conditioned.accumulate import Accumulator, Measured, TextEmbeddings
from perception_jax.evals.conditioned.annotations import Annotations, EvaluatedClass
from perception_jax.evals.conditioned.results import results
from tests.parity.cases import Case, assert_close, check

TOLERANCE = 1e-6
OURS = ("static_auc", "blank_auc", "two_stage", "n_map", "n_map_r", "n_map_c", "n_map_f")
"""What a report has and the stored results do not."""


@check("give", when=lambda case: case.name.startswith("metrics"))
def every_number(case: Case) -> None:
    assert case.settings["unit"] == "percent"
    ks = {name: tuple(case.settings[name]) for name in ("recall_ks", "accuracy_ks")}
    for part in case.settings["subcases"].values():
        data = json.loads((case.directory / part["input"]).read_text())
        expected = json.loads((case.directory / part["expected"]).read_text())
        expected["strata"] = [[str(image), *more] for image, *more in expected["strata"]]
        if "prototypes_from_templates" in expected:
            _prototypes(data, expected.pop("prototypes_from_templates"))
        notes = Annotations.build(
            [
                _record(from_json(record, part["input"]), data["classes"])
                for record in data["images"]
            ],
            _classes(data["classes"]),
            federated=part["federated"],
            overlooked_share=float(case.settings["overlooked_area_share"]),
        )
        # All images in the order of the instructions; then only those needed, in another order.
        for backwards in (False, True):
            found = _in_percent(results(measure(notes, data, backwards), **ks).to_dict())
            _compare(json.loads(json.dumps(found)), expected, part["expected"])


def _record(image: MoinstImage, classes: list[Mapping[str, Any]]) -> Record:
    """A canonical record without its image file."""
    names = [entry["name"] for entry in classes]

    def annotation(one: Any) -> ObjectAnnotation:
        x, y, width, height = one.bbox or (0.0,) * 4
        return ObjectAnnotation(
            name=names[one.class_id],
            box=None if one.bbox is None else (x, y, x + width, y + height),
            captions=one.captions,
            salient=one.salient,
        )

    return Record(
        id=str(image.image_id),
        images=(np.zeros((2, 2, 3), np.uint8),),
        size=None if None in (image.width, image.height) else (image.width, image.height),
        objects=tuple(map(annotation, image.objects)),
        instructions=tuple(
            ObjectInstruction(text=one.instruction, target=k)
            for k, one in enumerate(image.objects)
            if one.instruction is not None
        ),
        absent=tuple(names[k] for k in image.neg_class_ids or ()),
        not_exhaustive=tuple(names[k] for k in image.nonexhaustive_class_ids or ()),
    )


def _in_percent(found: Any, key: str = "") -> Any:
    """With all fractions but cosines and AUC times 100."""
    if isinstance(found, dict) and key != "diagnostics":
        return {name: _in_percent(part, name) for name, part in found.items()}
    return 100 * found if isinstance(found, float) else found


def measure(notes: Annotations, data: Mapping[str, Any], backwards: bool) -> Measured:
    given = {name: np.asarray(rows, np.float32) for name, rows in data["embeddings"].items()}
    presence = np.asarray(data["presence_logit"], np.float32)
    none = np.zeros((0, given["prototypes"].shape[1]), np.float32)
    texts = TextEmbeddings(prototypes=given["prototypes"], captions=given.get("captions", none))
    accumulator = Accumulator(notes, texts, given["static"])
    made = accumulator.needs.made.tolist()
    for number in made[::-1] if backwards else made:
        (kind,) = np.flatnonzero(notes.class_instruction == number)
        images = accumulator.needs.images[number] if backwards else np.arange(notes.count)
        accumulator.add(
            number,
            images,
            given["conditioned"][images, kind],
            presence[images, kind],
            given["blank"][kind],
        )
    return accumulator.finish()


def _classes(table: list[Mapping[str, Any]]) -> list[EvaluatedClass]:
    assert [entry["class_id"] for entry in table] == list(range(len(table)))
    return [EvaluatedClass(name=entry["name"], frequency=entry.get("frequency")) for entry in table]


def _prototypes(data: Mapping[str, Any], expected: Any) -> None:
    names = [clean_name(entry["name"]) for entry in data["classes"]]
    table = {
        template.replace("{}", name): row
        for name, rows in zip(names, data["template_embeddings"], strict=True)
        for template, row in zip(prompts.TEMPLATES, rows, strict=True)
    }
    raw_names = [entry["name"] for entry in data["classes"]]
    found = prompts.prototypes(lambda texts: np.array([table[t] for t in texts]), raw_names)
    assert_close(found, np.array(expected), what="prototypes", tolerance=TOLERANCE)


def _compare(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        more = set(found) - set(expected)
        assert set(expected) <= set(found), f"{where}: lacks {set(expected) - set(found)}"
        assert more <= set(OURS), f"{where}: has {more}"
        for key, value in expected.items():
            _compare(found[key], value, f"{where}: {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for k, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            _compare(ours, theirs, f"{where}[{k}]")
    elif isinstance(expected, float):
        assert isinstance(found, float), f"{where}: {found}, not {expected}"
        assert math.isclose(found, expected, rel_tol=0, abs_tol=TOLERANCE), (
            f"{where}: {found}, not {expected}"
        )
    else:
        assert found == expected, f"{where}: {found}, not {expected}"
