"""Linear probes of frozen features: ridge regression, in closed form.

Letters: n rows, D features, E targets.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from perception_jax.errors import DataError

RIDGE = 30.0
"""Default strength of the penalty, on standardised features."""


def ridge(
    given: Float[np.ndarray, "n D"], wanted: Float[np.ndarray, "n E"], strength: float = RIDGE
) -> Callable[[Float[np.ndarray, "m D"]], Float[np.ndarray, "m E"]]:
    """Fits a linear regression from features, which it standardises, to targets.

    Returns:
      The function from features to targets.
    """
    mean, spread = given.mean(axis=0), given.std(axis=0) + 1e-6

    def rows(values: np.ndarray) -> np.ndarray:
        return np.pad((values - mean) / spread, ((0, 0), (0, 1)), constant_values=1.0)

    known = rows(given)
    penalty = strength * np.eye(known.shape[1])
    weights = np.linalg.solve(known.T @ known + penalty, known.T @ wanted)
    return lambda values: rows(values) @ weights


def probe_accuracy(
    given: Float[np.ndarray, "n D"],
    labels: list[str],
    tested: Float[np.ndarray, "m D"],
    wanted: list[str],
) -> float:
    """Share of test rows whose label has the highest score of a ridge regression to labels.

    Raises:
      DataError: no rows to learn from or to test.
    """
    if not labels or not wanted:
        raise DataError(
            f"linear probe: expected labelled rows to learn from and to test, found {len(labels)} "
            f"and {len(wanted)}."
        )
    names = sorted(set(labels))
    targets = np.array([[label == name for name in names] for label in labels], np.float64)
    best = ridge(given, targets)(tested).argmax(axis=1)
    return float(np.mean([names[k] == label for k, label in zip(best, wanted, strict=True)]))
