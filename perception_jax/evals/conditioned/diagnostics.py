"""Does the embedding show what is there, or repeat the instruction?

A healthy model has a clearly higher cosine with the class prototype for images that have the class
than for images that lack it and for a blank image. Letters: p present, a absent pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Real

from perception_jax.evals.conditioned.accumulate import Measured
from perception_jax.evals.conditioned.annotations import ABSENT, STRATA


def diagnostics(measured: Measured) -> dict[str, Any]:
    """Mean cosines with the prototype, and how well presence logits tell present from absent.

    Returns:
      "cosine_present", "cosine_absent", and "cosine_blank" over the classes of the present pairs;
      "oid_auc" per stratum of the present pairs, and beside it "static_auc" by the cosine without
      an instruction and, if they were given, "blank_auc" by the presence logits of a blank image;
      "n_absent" pairs. None where there is nothing.
    """
    pairs, absent = measured.annotations.pairs, measured.annotations.labels == ABSENT
    present = pairs.image, pairs.class_id
    deciding = measured.deciding
    systems = {"oid_auc": "presence", "static_auc": "static", "blank_auc": "blank"}

    def areas(scores: np.ndarray) -> dict[str, float | None]:
        return {
            stratum: area_under_curve(scores[present][pairs.within(stratum)], scores[absent])
            for stratum in STRATA
        }

    return {
        "cosine_present": _mean(measured.cosine[present]),
        "cosine_absent": _mean(measured.cosine[absent]),
        "cosine_blank": _mean(measured.blank[pairs.class_id]),
        **{name: areas(deciding[key]) for name, key in systems.items() if key in deciding},
        "n_absent": int(np.count_nonzero(absent)),
    }


def area_under_curve(
    present: Real[np.ndarray, " p"], absent: Real[np.ndarray, " a"]
) -> float | None:
    """Chance that a present pair scores above an absent one, equal scores counting half."""
    if not len(present) or not len(absent):
        return None
    ordered = np.sort(absent)
    below, up_to = (np.searchsorted(ordered, present, side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(absent))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None
