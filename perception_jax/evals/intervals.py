"""Confidence intervals: how much of a score is luck of the draw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from perception_jax.errors import DataError


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


def bootstrap_interval(
    values: Float[np.ndarray, " n"],
    statistic: Callable[[np.ndarray], float],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval (Efron, 1979) of any statistic of independent values.

    Args:
      values: one per example.
      statistic: takes resampled values, gives a number.
      confidence: share of resamples inside the interval.
      resamples: number of draws with replacement.
      seed: the same seed gives the same interval.

    Raises:
      DataError: no values.
    """
    if len(values) == 0:
        raise DataError("expected at least one value, found none in bootstrap_interval")
    rng = np.random.default_rng(seed)
    draws = [statistic(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
