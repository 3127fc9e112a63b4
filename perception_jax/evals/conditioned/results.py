"""All scores of an evaluation as one nested dict, from what was measured.

Naming (the "P-protocol") leaks the answer through the instruction, so its copy floor stands beside
it: the same with a blank image. Deciding (the "L-protocol") asks about every evaluated class of
every image. Letters: N images, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from perception_jax.errors import ConfigError
from perception_jax.evals.conditioned.accumulate import Measured
from perception_jax.evals.conditioned.annotations import ABSENT, FREQUENCIES, STRATA, Annotations
from perception_jax.evals.conditioned.retrieval import SYSTEMS, TWO_STAGE, Outcomes
from perception_jax.evals.intervals import ClassMean, ClassRanking, QueryMean, Statistic
from perception_jax.evals.ranking import area_under_curve, mean, relevant_ranks, two_stage, within

RECALL_KS, ACCURACY_KS = (1, 5, 10), (1, 5)
"""Ranks up to which a right item counts, by default."""

BySystem = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""System, then stratum, then metric. Rates are fractions, not rounded; None means no query."""

_NAMING = {"conditioned": "conditioned", "static": "static", "copy_floor": "blank"}
"""Names of the systems in naming, and in `Measured`."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ConditionedResults:
    """Every number with the number of queries behind it (`count_name`).

    Attributes:
      strata: (image id, class id, stratum or None) of each pair.
      num_pairs: pairs per stratum.
      p_protocol: naming, "acc@k", by "conditioned", "static" and the "copy_floor" (a blank image).
      l_protocol: deciding by "presence", "calibrated_cosine", "static" and, if its presence logits
        were given, "blank": what the instruction alone says. "ap", average precision by class id (a
        string) of the classes that have one; "map", its mean; "map_r", "map_c" and "map_f" if the
        classes have frequencies; "hit@1" and "r_precision" of the ranking of each image's classes.
      text_to_image, image_to_image: "r@k" and "map" by "conditioned", "static" and "blank"; None if
        left out. Without captions, text to image has one query for each class.
      image_to_text: "r@k" among all captions and "same_class_r@1"; None without captions, where
        naming takes its place.
      two_stage: "top", and "text_to_image" and "image_to_image" per stratum; None if left out.
      diagnostics: whether the embedding shows what is there, or repeats the instruction: mean
        cosines with the class prototype, "cosine_present", "cosine_absent", and "cosine_blank" over
        the classes of the present pairs; "oid_auc" per stratum of the present pairs by the presence
        logits, "static_auc" by the cosine without an instruction and, if they were given,
        "blank_auc" by the presence logits of a blank image; "n_absent" pairs.
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


def results(
    measured: Measured,
    *,
    recall_ks: Sequence[int] = RECALL_KS,
    accuracy_ks: Sequence[int] = ACCURACY_KS,
) -> ConditionedResults:
    """Scores what was measured.

    Args:
      recall_ks, accuracy_ks: ranks up to which a right item counts, in retrieval and in naming.
    """
    notes, found = measured.annotations, {}
    for task in ("p_protocol", "l_protocol", "text_to_image", "image_to_text", "image_to_image"):
        ks = accuracy_ks if task == "p_protocol" else recall_ks
        found[task] = {
            system: {
                stratum: _numbers(_metrics(measured, task, system, stratum, ks))
                for stratum in STRATA
            }
            for system in _systems(measured, task)
        } or None
    staged = None
    if measured.tasks:
        tasks = ("text_to_image", "image_to_image")
        staged = {"top": measured.top, **{task: found[task].pop(TWO_STAGE) for task in tasks}}
    pairs = notes.pairs
    return ConditionedResults(
        strata=tuple(
            (notes.image_ids[image], int(kind), STRATA[stratum] if stratum else None)
            for image, kind, stratum in zip(
                pairs.image.tolist(), pairs.class_id, pairs.stratum, strict=True
            )
        ),
        num_pairs={s: int(np.count_nonzero(pairs.within(s))) for s in STRATA},
        two_stage=staged,
        diagnostics=_diagnostics(measured),
        **found,
    )


def statistic(
    measured: Measured, task: str, system: str, metric: str, stratum: str = "all"
) -> Statistic:
    """A number of the results in the form that can be resampled (`intervals.paired_interval`).

    Args:
      task, system, metric, stratum: as in `ConditionedResults`, with any k; of "two_stage" the task
        with the system "two_stage". "ap" of a single class and the diagnostics cannot be asked for.

    Raises:
      ConfigError: there is no such number.
    """
    k = metric.rpartition("@")[2]
    found = {}
    if system in _systems(measured, task):
        found = _metrics(measured, task, system, stratum, (int(k),) if k.isdecimal() else ())
    if metric not in found or metric == "ap":
        raise ConfigError(
            f"expected a task, system and metric of the results, found {task!r}, {system!r} and "
            f"{metric!r}; see ConditionedResults.to_dict()"
        )
    return found[metric]


def count_name(metric: str) -> str:
    """Name of the number of queries, images or classes behind a metric."""
    of_images = dict.fromkeys(("hit@1", "r_precision"), "n_images")
    others = of_images | {"same_class_r@1": "n_same_class"}
    return f"n_{metric}" if metric.startswith("map") else others.get(metric, "n")


def _systems(measured: Measured, task: str) -> tuple[str, ...]:
    """What a task compares; () if it was left out."""
    if task == "text_to_image" and measured.tasks and task not in measured.tasks:
        return (*SYSTEMS, TWO_STAGE)
    known = {"p_protocol": _NAMING, "l_protocol": measured.deciding, **measured.tasks}
    return tuple(known.get(task, ()))


def _metrics(
    measured: Measured, task: str, system: str, stratum: str, ks: Sequence[int]
) -> dict[str, Any]:
    """Statistics by metric; "ap" is a dict of numbers."""
    notes, tasks = measured.annotations, measured.tasks
    if task == "p_protocol":
        return _by_pair(notes, measured.naming[_NAMING[system]], stratum, ks, "acc")
    if task == "l_protocol":
        return _deciding(notes, measured.deciding[system], stratum)
    if task == "image_to_text":
        alone = _by_pair(notes, tasks["same_class"][system], stratum, (1,), "same_class_r")
        return _by_pair(notes, tasks[task][system], stratum, ks) | alone
    if task in tasks:
        owners = notes.captions.pair if task == "text_to_image" else None
        return _by_pair(notes, tasks[task][system], stratum, ks, owners=owners, precision=True)
    scores = _class_queries(measured, system, stratum)
    ranking = ClassRanking(scores, notes.relevant(stratum), notes.allowed(stratum))
    return {f"r@{k}": ClassMean(ranking, k) for k in ks} | {"map": ClassMean(ranking)}


def _by_pair(
    notes: Annotations,
    outcomes: Outcomes,
    stratum: str,
    ks: Sequence[int],
    name: str = "r",
    *,
    owners: np.ndarray | None = None,
    precision: bool = False,
) -> dict[str, QueryMean]:
    """Means over the queries of a stratum. Args: owners: pair of each query, if it is no pair."""
    chosen, image = notes.pairs.within(stratum), notes.pairs.image
    if owners is not None:
        chosen, image = chosen[owners], image[owners]
    values = {f"{name}@{k}": within(outcomes.first, k) for k in ks}
    if precision:
        values["map"] = outcomes.precision
    return {key: QueryMean(each[chosen], image[chosen]) for key, each in values.items()}


def _deciding(
    notes: Annotations, scores: Float32[np.ndarray, "N C"], stratum: str
) -> dict[str, Any]:
    masks = notes.relevant(stratum), notes.allowed(stratum)
    ranking, images = ClassRanking(scores, *masks), relevant_ranks(scores, *masks)
    precision = ranking.ranks.average_precision()
    groups = np.array([kind.frequency or "" for kind in notes.classes])
    each = np.arange(notes.count)
    return {
        "ap": {str(c): float(precision[c]) for c in np.flatnonzero(precision >= 0)},
        "map": ClassMean(ranking),
        **{
            f"map_{frequency}": ClassMean(ranking, chosen=groups == frequency)
            for frequency in (FREQUENCIES if groups.any() else ())
        },
        "hit@1": QueryMean(within(images.first(), 1), each),
        "r_precision": QueryMean(images.r_precision(), each),
    }


def _class_queries(measured: Measured, system: str, stratum: str) -> Float32[np.ndarray, "N C"]:
    """Scores of text to image with one query for each class."""
    static, fine = measured.static, measured.cosine
    if system == TWO_STAGE:
        parts = (static, fine, measured.annotations.allowed(stratum))
        return two_stage(*(np.ascontiguousarray(x.T) for x in parts), top=measured.top).T
    return {"conditioned": fine, "static": static, "blank": np.zeros_like(static)}[system]


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one in metrics.items():
        if name == "ap":
            found[name] = one
        else:
            values = one.values
            found |= {name: mean(values), count_name(name): int(np.count_nonzero(values >= 0))}
    return found


def _diagnostics(measured: Measured) -> dict[str, Any]:
    pairs, absent = measured.annotations.pairs, measured.annotations.labels == ABSENT
    present = pairs.image, pairs.class_id
    deciding = measured.deciding
    systems = {"oid_auc": "presence", "static_auc": "static", "blank_auc": "blank"}

    def areas(scores: np.ndarray) -> dict[str, float | None]:
        return {
            stratum: area_under_curve(scores[present][pairs.within(stratum)], scores[absent])
            for stratum in STRATA
        }

    def average(values: np.ndarray) -> float | None:
        return float(values.mean(dtype=np.float64)) if len(values) else None

    return {
        "cosine_present": average(measured.cosine[present]),
        "cosine_absent": average(measured.cosine[absent]),
        "cosine_blank": average(measured.blank[pairs.class_id]),
        **{name: areas(deciding[key]) for name, key in systems.items() if key in deciding},
        "n_absent": int(np.count_nonzero(absent)),
    }
