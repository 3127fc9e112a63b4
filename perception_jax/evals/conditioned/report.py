"""All scores of an evaluation as one nested dict, from what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perception_jax.evals.conditioned import classification, means
from perception_jax.evals.conditioned.accumulate import Measured
from perception_jax.evals.conditioned.annotations import STRATA, Annotations
from perception_jax.evals.conditioned.classification import class_query_scores
from perception_jax.evals.conditioned.diagnostics import diagnostics
from perception_jax.evals.conditioned.means import Scores
from perception_jax.evals.conditioned.ranks import two_stage
from perception_jax.evals.conditioned.retrieval import SYSTEMS, TWO_STAGE

RECALL_KS, ACCURACY_KS = (1, 5, 10), (1, 5)
"""Ranks up to which a right item counts, by default."""

BySystem = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""System, then stratum, then metric. Rates are percent, not rounded; None means no query."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """Every number with the number of queries behind it.

    Attributes:
      strata: (image id, class id, stratum or None) of each pair.
      num_pairs: pairs per stratum.
      p_protocol: naming by "conditioned", "static" and the "copy_floor" (a blank image).
      l_protocol: deciding by "presence", "calibrated_cosine", "static" and, if its presence logits
        were given, "blank": what the instruction alone says.
      text_to_image, image_to_image: by "conditioned", "static" and "blank"; None if left out.
      image_to_text: the same; None without captions, where naming takes its place.
      two_stage: "top", and "text_to_image" and "image_to_image" per stratum; None if left out.
      diagnostics: see `diagnostics.diagnostics`.
    """

    strata: tuple[tuple[int | str, int, str | None], ...]
    num_pairs: Mapping[str, int]
    p_protocol: BySystem
    l_protocol: BySystem
    text_to_image: BySystem | None
    image_to_text: BySystem | None
    image_to_image: BySystem | None
    two_stage: Mapping[str, Any] | None
    diagnostics: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; parts that were left out are not in it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        strata = [list(row) for row in self.strata]
        return {name: part for name, part in fields.items() if part is not None} | {
            "strata": strata
        }


def report(
    measured: Measured,
    *,
    recall_ks: Sequence[int] = RECALL_KS,
    accuracy_ks: Sequence[int] = ACCURACY_KS,
) -> Report:
    """Scores what was measured.

    Args:
      recall_ks, accuracy_ks: ranks up to which a right item counts, in retrieval and in naming.
    """
    notes, naming = measured.annotations, measured.naming
    floors = {"conditioned": "conditioned", "static": "static", "copy_floor": "blank"}
    tasks = measured.tasks
    from_text = _text_to_image(measured, recall_ks) if tasks else None
    from_image = _by_pair(notes, tasks["image_to_image"], recall_ks) if tasks else None
    staged = None
    if tasks:
        staged = {
            "top": measured.top,
            "text_to_image": from_text.pop(TWO_STAGE),
            "image_to_image": from_image.pop(TWO_STAGE),
        }
    return Report(
        strata=_strata(notes),
        num_pairs={s: int(np.count_nonzero(notes.pairs.within(s))) for s in STRATA},
        p_protocol={
            name: classification.naming_scores(notes, naming[system], accuracy_ks)
            for name, system in floors.items()
        },
        l_protocol={
            name: classification.candidate_scores(notes, scores)
            for name, scores in measured.deciding.items()
        },
        text_to_image=from_text,
        image_to_text=_image_to_text(measured, recall_ks) if "image_to_text" in tasks else None,
        image_to_image=from_image,
        two_stage=staged,
        diagnostics=diagnostics(measured),
    )


def class_query_systems(measured: Measured, stratum: str) -> dict[str, np.ndarray]:
    """Scores float32[N, C] of text-to-image with one query for each class, by system."""
    static, fine = measured.static, measured.cosine
    allowed = measured.annotations.allowed(stratum)
    staged = two_stage(
        *(np.ascontiguousarray(x.T) for x in (static, fine, allowed)), top=measured.top
    )
    blank = np.zeros_like(static)
    return dict(zip(SYSTEMS, (fine, static, blank), strict=True)) | {TWO_STAGE: staged.T}


def _text_to_image(measured: Measured, ks: Sequence[int]) -> dict[str, dict[str, Scores]]:
    notes = measured.annotations
    if "text_to_image" not in measured.tasks:
        found: dict[str, dict[str, Scores]] = {}
        for stratum in STRATA:
            for system, scores in class_query_systems(measured, stratum).items():
                one = class_query_scores(notes, scores, stratum, ks)
                found.setdefault(system, {})[stratum] = one
        return found
    owners = notes.captions.pair
    return {
        system: {
            stratum: means.retrieval_scores(outcomes, notes.pairs.within(stratum)[owners], ks)
            for stratum in STRATA
        }
        for system, outcomes in measured.tasks["text_to_image"].items()
    }


def _by_pair(
    notes: Annotations, systems: Mapping[str, Any], ks: Sequence[int]
) -> dict[str, dict[str, Scores]]:
    return {
        system: {
            stratum: means.retrieval_scores(outcomes, notes.pairs.within(stratum), ks)
            for stratum in STRATA
        }
        for system, outcomes in systems.items()
    }


def _image_to_text(measured: Measured, ks: Sequence[int]) -> dict[str, dict[str, Scores]]:
    found = {}
    for system, outcomes in measured.tasks["image_to_text"].items():
        same = measured.tasks["same_class"][system]
        found[system] = {}
        for stratum in STRATA:
            chosen = measured.annotations.pairs.within(stratum)
            scores = means.shares(outcomes.first[chosen], ks, "r")
            alone = means.shares(same.first[chosen], (1,), "same_class_r")
            scores |= {"same_class_r@1": alone["same_class_r@1"], "n_same_class": alone["n"]}
            found[system][stratum] = scores
    return found


def _strata(notes: Annotations) -> tuple[tuple[int | str, int, str | None], ...]:
    pairs = notes.pairs
    return tuple(
        (notes.image_ids[image], int(kind), STRATA[stratum] if stratum else None)
        for image, kind, stratum in zip(
            pairs.image.tolist(), pairs.class_id, pairs.stratum, strict=True
        )
    )
