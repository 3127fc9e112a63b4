"""Confidence intervals: how much of a score is luck of the draw.

The bootstrap (Efron, 1979; percentiles) draws images with replacement. A resample is a weight of
each image: one that is drawn twice counts twice, as queries, and in rankings of images per class as
two items. Galleries of retrieval stay whole.
All values are fractions. Letters: N images, C classes, q queries, r resamples.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from perception_jax.errors import DataError
from perception_jax.evals import ranking

_AT_ONCE = 100
"""Resamples per block: a weight of each image in each of them is held."""


def wilson_interval(
    correct: int | float, total: int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927) of a proportion `correct / total`.

    Unlike the normal approximation it stays in [0, 1] and is honest near 0 and 1.

    Raises:
      DataError: not 0 <= correct <= total, or total is 0.
    """
    if total < 1 or not 0 <= correct <= total:
        raise DataError(
            f"expected 0 <= correct <= total and total >= 1, found {correct} of {total} in "
            "wilson_interval; check that the split is not empty"
        )
    z = statistics.NormalDist().inv_cdf(0.5 + confidence / 2)
    share = correct / total
    spread = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / spread
    half = z / spread * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


@runtime_checkable
class Statistic(Protocol):
    """A mean that can be resampled.

    Attributes:
      values: of each query or class, in [0, 1]; NaN for one that is skipped.
    """

    values: Float[np.ndarray, " q"]

    def under(self, weights: Float32[np.ndarray, "r N"]) -> Float[np.ndarray, " r"]:
        """The mean if each image counts as often as its weight says; NaN without a query."""


@dataclasses.dataclass(frozen=True, eq=False)
class QueryMean:
    """Mean of a value per query, each of which belongs to an image; a `Statistic`.

    Attributes:
      values: see `Statistic`.
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
            return (weights @ total) / (weights @ queries)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassRanking:
    """A ranking of images for each class.

    Attributes:
      scores: of each image.
      relevant, allowed: images that show the class; images that take part.
    """

    scores: Float32[np.ndarray, "N C"]
    relevant: Bool[np.ndarray, "N C"]
    allowed: Bool[np.ndarray, "N C"]

    @functools.cached_property
    def ranks(self) -> ranking.RelevantRanks:
        """With the classes as queries."""
        parts = (self.scores, self.relevant, self.allowed)
        return ranking.relevant_ranks(*(np.ascontiguousarray(part.T) for part in parts))

    @functools.cached_property
    def orders(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per class, its images by score, and the positions of the relevant ones, ascending."""
        found = []
        for kind in range(self.scores.shape[1]):
            items = np.flatnonzero(self.allowed[:, kind])
            items = items[np.argsort(ranking.order_keys(self.scores[None, items, kind])[0])]
            found.append((items, np.flatnonzero(self.relevant[items, kind])))
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class ClassMean:
    """Mean over classes of a score of each class's ranking of images; a `Statistic`.

    Attributes:
      ranking: of all classes.
      k: None for average precision, else whether a relevant image is among the first k.
      chosen: which classes count; all by default.
    """

    ranking: ClassRanking
    k: int | None = None
    chosen: Bool[np.ndarray, " C"] | None = None

    @property
    def values(self) -> Float[np.ndarray, " c"]:
        """See `Statistic`."""
        ranks = self.ranking.ranks
        found = (
            ranks.average_precision() if self.k is None else ranking.within(ranks.first(), self.k)
        )
        return found if self.chosen is None else found[self.chosen]

    def under(self, weights: Float32[np.ndarray, "r N"]) -> Float[np.ndarray, " r"]:
        """See `Statistic`. A class counts in the resamples that have both kinds of its images."""
        total, classes = np.zeros(len(weights)), np.zeros(len(weights))
        orders: Sequence[tuple[np.ndarray, np.ndarray]] = self.ranking.orders
        if self.chosen is not None:
            orders = [orders[kind] for kind in np.flatnonzero(self.chosen)]
        for order, right in orders:
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
            return total / classes

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
    """A difference of two fractions and its interval.

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
    """Percentile interval of `first - second`, both on the same resampled images.

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
        drawn = [rng.integers(0, images, images) for _ in range(min(_AT_ONCE, resamples - start))]
        counts = [np.bincount(rows, minlength=images) for rows in drawn]
        weights = np.stack(counts).astype(np.float32)
        draws.append(first.under(weights) - second.under(weights))
    found = np.concatenate(draws)
    found = found[~np.isnan(found)]
    low, high = np.quantile(found, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Difference(value, float(low), float(high), len(found))
