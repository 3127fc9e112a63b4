"""Means over the queries that count, as percent. None where no query counts.

Letters: q queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from perception_jax.evals.conditioned.retrieval import Outcomes

Scores = dict[str, float | int | None]
"""Numbers by metric; `n` and `n_…` are numbers of queries, the others percent."""


def percent(values: Float[np.ndarray, " q"]) -> float | None:
    """Of values in [0, 1]; NaN is no query."""
    counted = values[~np.isnan(values)]
    return 100 * float(counted.mean()) if len(counted) else None


def within(first: Int[np.ndarray, " q"], k: int) -> Float[np.ndarray, " q"]:
    """1 for a query whose first relevant item is among the first k, else 0; NaN if skipped."""
    return np.where(first > 0, (first <= k).astype(np.float64), np.nan)


def shares(first: Int[np.ndarray, " q"], ks: Sequence[int], name: str) -> Scores:
    """`{name}@k` for each k, and `n`."""
    found: Scores = {f"{name}@{k}": percent(within(first, k)) for k in ks}
    return found | {"n": int(np.count_nonzero(first))}


def retrieval_scores(
    outcomes: Outcomes, chosen: Bool[np.ndarray, " q"], ks: Sequence[int]
) -> Scores:
    """Recall at each k and mean average precision of the chosen queries, with their numbers."""
    precision = outcomes.precision[chosen]
    found = shares(outcomes.first[chosen], ks, "r")
    return found | {"map": percent(precision), "n_map": int(np.count_nonzero(precision >= 0))}
