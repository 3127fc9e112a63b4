"""What is in an image: by naming what the instruction names, and by deciding for each candidate.

Naming (the "P-protocol") leaks the answer through the instruction, so its copy floor stands beside
it: the same with a blank image. Deciding (the "L-protocol") asks about every evaluated class of
every image. Letters: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from perception_jax.evals.conditioned import means
from perception_jax.evals.conditioned.annotations import FREQUENCIES, STRATA, Annotations
from perception_jax.evals.conditioned.means import Scores
from perception_jax.evals.conditioned.ranks import RelevantRanks, relevant_ranks
from perception_jax.evals.conditioned.retrieval import Outcomes


def naming_scores(
    annotations: Annotations, outcomes: Outcomes, ks: Sequence[int]
) -> dict[str, Scores]:
    """Accuracy of naming per stratum: "acc@k" for each k, and "n" pairs."""
    return {
        stratum: means.shares(outcomes.first[annotations.pairs.within(stratum)], ks, "acc")
        for stratum in STRATA
    }


def candidate_scores(
    annotations: Annotations, scores: Float32[np.ndarray, "N C"]
) -> dict[str, dict[str, Any]]:
    """Scores of deciding per stratum, from a score of each image and class.

    Returns:
      Per stratum: "ap", average precision by class id (a string) of the classes that have one;
      "map", its mean; "map_r", "map_c" and "map_f" if the classes have frequencies; each with its
      number of classes, "n_map…"; "hit@1" and "r_precision" with "n_images".
    """
    return {stratum: _candidate_scores(annotations, scores, stratum) for stratum in STRATA}


def class_ranks(
    annotations: Annotations, scores: Float32[np.ndarray, "N C"], stratum: str
) -> RelevantRanks:
    """For each class, the ranks of the images that have it among those evaluated for it."""
    relevant, allowed = annotations.relevant(stratum), annotations.allowed(stratum)
    return relevant_ranks(*(np.ascontiguousarray(x.T) for x in (scores, relevant, allowed)))


def class_query_scores(
    annotations: Annotations, scores: Float32[np.ndarray, "N C"], stratum: str, ks: Sequence[int]
) -> Scores:
    """Text-to-image retrieval with one query for each class; `ks` as of `means`."""
    ranked = class_ranks(annotations, scores, stratum)
    outcomes = Outcomes(ranked.first(), ranked.average_precision())
    return means.retrieval_scores(outcomes, ranked.answerable, ks)


def _candidate_scores(annotations: Annotations, scores: np.ndarray, stratum: str) -> dict[str, Any]:
    precision = class_ranks(annotations, scores, stratum).average_precision()
    found: dict[str, Any] = {
        "ap": {str(c): 100 * float(precision[c]) for c in np.flatnonzero(precision >= 0)},
        "map": means.percent(precision),
        "n_map": int(np.count_nonzero(precision >= 0)),
    }
    groups = np.array([kind.frequency or "" for kind in annotations.classes])
    for frequency in FREQUENCIES if groups.any() else ():
        part = precision[groups == frequency]
        found[f"map_{frequency}"] = means.percent(part)
        found[f"n_map_{frequency}"] = int(np.count_nonzero(part >= 0))
    images = relevant_ranks(scores, annotations.relevant(stratum), annotations.allowed(stratum))
    found["hit@1"] = means.percent(means.within(images.first(), 1))
    found["r_precision"] = means.percent(images.r_precision())
    return found | {"n_images": int(np.count_nonzero(images.answerable))}
