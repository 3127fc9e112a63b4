"""How sure the difference of two systems is: paired bootstrap over images.

Every resample draws images with replacement and scores both systems on the same draw (Efron, 1979;
percentiles). An image that is drawn twice counts twice: as queries, and in rankings of images per
class as two items. Galleries of retrieval stay whole. A resample is a weight per image.
Letters: N images, C classes, q queries, r resamples.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int

from perception_jax.errors import ConfigError, DataError
from perception_jax.evals.conditioned import means, ranks
from perception_jax.evals.conditioned.accumulate import Measured
from perception_jax.evals.conditioned.report import class_query_systems

_AT_ONCE = 100
"""Resamples per block: a weight of each image in each of them is held."""


@runtime_checkable
class Statistic(Protocol):
    """A score as a function of how often each image counts."""

    def under(self, weights: Float32[np.ndarray, "r N"]) -> Float[np.ndarray, " r"]:
        """Percent; NaN for a resample without a query."""


@dataclasses.dataclass(frozen=True, eq=False)
class QueryMean:
    """Mean of a value in [0, 1] per query, each of which belongs to an image.

    Attributes:
      values: NaN for a query that is skipped.
      image: of each query.
    """

    values: Float[np.ndarray, " q"]
    image: Int[np.ndarray, " q"]

    def under(self, weights: Float32[np.ndarray, "r N"]) -> Float[np.ndarray, " r"]:
        """See `Statistic`."""
        counted = ~np.isnan(self.values)
        image, values, count = self.image[counted], self.values[counted], weights.shape[1]
        total, queries = (np.bincount(image, w, minlength=count) for w in (values, None))
        with np.errstate(invalid="ignore"):
            return 100 * (weights @ total) / (weights @ queries)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassMean:
    """Mean over classes of a score of each class's ranking of images.

    Attributes:
      order: per class, its images by score.
      right: per class, the positions of the relevant ones, ascending.
      k: None for average precision, else whether a relevant image is among the first k.
    """

    order: tuple[np.ndarray, ...]
    right: tuple[np.ndarray, ...]
    k: int | None = None

    @classmethod
    def of(
        cls, scores: np.ndarray, relevant: np.ndarray, allowed: np.ndarray, k: int | None = None
    ) -> ClassMean:
        """From scores float32[N, C] and what is relevant and takes part, bool[N, C]."""
        order, right = [], []
        for kind in range(scores.shape[1]):
            items = np.flatnonzero(allowed[:, kind])
            items = items[np.argsort(ranks.order_keys(scores[None, items, kind])[0])]
            order.append(items)
            right.append(np.flatnonzero(relevant[items, kind]))
        return cls(tuple(order), tuple(right), k)

    def under(self, weights: Float32[np.ndarray, "r N"]) -> Float[np.ndarray, " r"]:
        """See `Statistic`. A class counts in the resamples that have both kinds of its images."""
        total, classes = np.zeros(len(weights)), np.zeros(len(weights))
        for order, right in zip(self.order, self.right, strict=True):
            if not 0 < len(right) < len(order):
                continue
            drawn = np.cumsum(weights[:, order], axis=1)
            times = weights[:, order[right]]
            relevant = times.sum(axis=1)
            counts = (relevant > 0) & (relevant < drawn[:, -1])
            before = drawn[:, right] - times
            value = self._precision(times, before) if self.k is None else self._hit(times, before)
            total += np.where(counts, value, 0.0)
            classes += counts
        with np.errstate(invalid="ignore"):
            return 100 * total / classes

    def _hit(self, times: np.ndarray, before: np.ndarray) -> np.ndarray:
        return ((times > 0) & (before < self.k)).any(axis=1)

    def _precision(self, times: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Copies of an image follow each other in the ranking."""
        earlier = np.cumsum(times, axis=1) - times
        value = np.zeros(len(times))
        for copy in range(1, int(times.max(initial=0)) + 1):
            there = times >= copy
            value += np.where(there, (earlier + copy) / (before + copy), 0.0).sum(axis=1)
        return value / np.maximum(times.sum(axis=1), 1)


@dataclasses.dataclass(frozen=True)
class Difference:
    """A difference in percentage points and its interval.

    Attributes:
      value: first less second, on the images as they are.
      low, high: of the interval.
      resamples: that had queries at all.
    """

    value: float
    low: float
    high: float
    resamples: int


def paired_interval(
    first: Statistic,
    second: Statistic,
    images: int,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Percentile interval of `first - second` over resampled images.

    Args:
      images: number of images that both were measured on.

    Raises:
      DataError: one of them has no queries.
    """
    whole = np.ones((1, images), np.float32)
    value = float(first.under(whole)[0] - second.under(whole)[0])
    if np.isnan(value):
        raise DataError("expected two scores with queries to compare, found one without any")
    rng, draws = np.random.default_rng(seed), []
    for start in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - start)
        weights = np.stack(
            [
                np.bincount(rng.integers(0, images, images), minlength=images).astype(np.float32)
                for _ in range(count)
            ]
        )
        draws.append(first.under(weights) - second.under(weights))
    found = np.concatenate(draws)
    found = found[~np.isnan(found)]
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Difference(value, float(low), float(high), len(found))


def statistic(
    measured: Measured, task: str, system: str, metric: str, stratum: str = "all"
) -> Statistic:
    """A number of the report in the form that can be resampled.

    Args:
      task, system, metric, stratum: as in `report.Report`; of "two_stage" the task with the system
        "two_stage". "ap" of a single class and the diagnostics cannot be asked for.

    Raises:
      ConfigError: there is no such number.
    """
    found = None
    if task == "p_protocol":
        found = _naming(measured, system, metric, stratum)
    elif task == "l_protocol":
        found = _deciding(measured, system, metric, stratum)
    elif task == "text_to_image" and measured.tasks and task not in measured.tasks:
        found = _class_queries(measured, system, metric, stratum)
    elif task in measured.tasks:
        found = _queries(measured, task, system, metric, stratum)
    if found is None:
        raise ConfigError(
            f"expected a task, system and metric of the report, found {task!r}, {system!r} and "
            f"{metric!r}; see Report.to_dict()"
        )
    return found


def _naming(measured: Measured, system: str, metric: str, stratum: str) -> Statistic | None:
    outcomes = measured.naming.get("blank" if system == "copy_floor" else system)
    name, _, k = metric.partition("@")
    if outcomes is None or name != "acc" or not k.isdigit():
        return None
    pairs = measured.annotations.pairs
    chosen = pairs.within(stratum)
    return QueryMean(means.within(outcomes.first[chosen], int(k)), pairs.image[chosen])


def _deciding(measured: Measured, system: str, metric: str, stratum: str) -> Statistic | None:
    notes, scores = measured.annotations, measured.deciding.get(system)
    if scores is None:
        return None
    relevant, allowed = notes.relevant(stratum), notes.allowed(stratum)
    if metric == "map":
        return ClassMean.of(scores, relevant, allowed)
    found = ranks.relevant_ranks(scores, relevant, allowed)
    per_image = {"hit@1": means.within(found.first(), 1), "r_precision": found.r_precision()}
    return QueryMean(per_image[metric], np.arange(notes.count)) if metric in per_image else None


def _class_queries(measured: Measured, system: str, metric: str, stratum: str) -> Statistic | None:
    notes, systems = measured.annotations, class_query_systems(measured, stratum)
    name, _, k = metric.partition("@")
    if system not in systems or (metric != "map" and (name != "r" or not k.isdigit())):
        return None
    masks = notes.relevant(stratum), notes.allowed(stratum)
    return ClassMean.of(systems[system], *masks, int(k) if k else None)


def _queries(
    measured: Measured, task: str, system: str, metric: str, stratum: str
) -> Statistic | None:
    if metric == "same_class_r@1":
        task, metric = "same_class", "r@1"
    outcomes = measured.tasks[task].get(system)
    name, _, k = metric.partition("@")
    if outcomes is None:
        return None
    if metric == "map" and not np.isnan(outcomes.precision).all():
        values = outcomes.precision
    elif name == "r" and k.isdigit():
        values = means.within(outcomes.first, int(k))
    else:
        return None
    notes = measured.annotations
    pair = notes.captions.pair if task == "text_to_image" else np.arange(len(notes.pairs.image))
    chosen = notes.pairs.within(stratum)[pair]
    return QueryMean(values[chosen], notes.pairs.image[pair][chosen])
