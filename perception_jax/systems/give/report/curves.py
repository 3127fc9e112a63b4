"""Learning curves of GiVE, from the rows of `metrics.jsonl`.

They show two things. Training starts on a plateau, where OID is at chance: its loss is ln 2. And
adapters can copy the instruction into the embedding of any image instead of using the image: then
the cosine with the instruction is as high for absent objects as for present ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from perception_jax.viz.sections import Curve, History, curves, step_chart

GUESSING = math.log(2)
"""OID loss of a decision at chance, nats."""
LEFT = 0.9 * GUESSING
"""Running mean of the OID loss below which training has left the plateau."""
WINDOW = 5
"""Number of logged steps of the running mean."""

_LOSSES = {"oitc": "OITC, image with caption", "oiic": "OIIC, image with image"}
_COSINES = {"cosine_present": "object present", "cosine_absent": "object absent"}
_EVALUATED_COSINES = {**_COSINES, "cosine_blank": "image of one colour"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau:
    """The plateau of the OID loss at the start of training.

    Attributes:
      end: the step at which it ends, or the last step so far.
      left: whether it ended.
    """

    end: int
    left: bool


def plateau(history: History) -> Plateau | None:
    """Finds the plateau: it ends at the last logged step at which the running mean of the OID loss
    is not below `LEFT`. None without a history, or without a plateau."""
    found = curves(history, {"oid": "oid"})
    if not found:
        return None
    steps, losses = found["oid"]
    mean = np.array([losses[max(0, k + 1 - WINDOW) : k + 1].mean() for k in range(len(losses))])
    chance = np.flatnonzero(mean >= LEFT)
    if not len(chance):
        return None
    last = int(chance[-1])
    return Plateau(end=int(steps[last]), left=last + 1 < len(steps))


def losses_chart(history: History) -> str | None:
    """Chart of OITC and OIIC; None without a history."""
    return step_chart(curves(history, _LOSSES), "Contrastive losses in training", "nats")


def decision_chart(history: History) -> str | None:
    """Chart of the OID loss with the plateau in its own colour; None without a history."""
    logged = curves(history, {"oid": "oid"})
    if not logged:
        return None
    steps, losses = logged["oid"]
    found = plateau(history)
    series = {"loss": (steps, losses)}
    if found is not None:
        on, after = steps <= found.end, steps >= found.end
        series = {f"on the plateau, to step {found.end:,}": (steps[on], losses[on])}
        if found.left:
            top = max(GUESSING, float(losses.max()))
            series["end of the plateau"] = np.array([found.end] * 2), np.array([0.0, top])
            series["after the plateau"] = steps[after], losses[after]
    title = "OID loss: is the object present?"
    return step_chart(series, title, "loss, nats", references={"chance, ln 2": GUESSING})


def cosines_chart(history: History) -> str | None:
    """Chart of the cosine of image and instruction in training; None without a history."""
    title = "Cosine with the instruction in training: equal lines mean copying"
    return step_chart(curves(history, _COSINES), title, "cosine")


def evaluated_cosines_chart(history: History, name: str) -> str | None:
    """The same chart for the test images; None with fewer than two evaluations."""
    found = _evaluations(history, name, _EVALUATED_COSINES)
    return step_chart(found, "Cosine with the object's name on test images", "cosine")


def naming_chart(history: History, name: str) -> str | None:
    """Chart of naming accuracy and its copy floor on the test images."""
    shown = {"p_acc1_conditioned": "image", "p_acc1_copy_floor": "image of one colour (copy floor)"}
    title = "Naming the object of the instruction"
    found = _evaluations(history, name, shown)
    return step_chart(found, title, "top-1 accuracy", percent=True)


def deciding_chart(history: History, name: str, static: Mapping[str, float | None]) -> str | None:
    """Chart of the AUC of present against absent objects on the test images.

    Args:
      static: the final AUC without an instruction, by stratum.
    """
    shown = {"oid_auc_overlooked": "overlooked objects", "oid_auc_all": "all objects"}
    found = _evaluations(history, name, shown)
    references = {
        f"{stratum}, without an instruction": value
        for stratum, value in (("overlooked", static["overlooked"]), ("all", static["all"]))
        if value is not None
    }
    title = "Present against absent objects on test images"
    return step_chart(found, title, "area under the ROC curve", percent=True, references=references)


def _evaluations(history: History, name: str, keys: Mapping[str, str]) -> dict[str, Curve]:
    """Curves of an evaluator's values; {} with fewer than two evaluations."""
    titles = {f"evaluate/{name}/{key}": title for key, title in keys.items()}
    return curves(history, titles, least=2)
