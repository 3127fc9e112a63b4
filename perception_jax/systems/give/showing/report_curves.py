"""The curves of a training, from the lines of its `metrics.jsonl`.

Two things are to be seen in them. Training first sits on a plateau, where OID only guesses: its
loss is that of a coin, ln 2. And steering can copy the instruction into any image instead of
looking: then the cosine with it is as high for absent objects as for present ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perception_jax.viz import line_chart

GUESSING = math.log(2)
"""Loss of a decision that knows nothing, nats."""
LEFT = 0.9 * GUESSING
"""A running mean below this has left the plateau."""
WINDOW = 5
"""Logged steps of the running mean."""

History = Sequence[Mapping[str, Any]]
"""Rows of `metrics.jsonl`."""
_LOSSES = {"oitc": "OITC, image with caption", "oiic": "OIIC, image with image"}
_COSINES = {"cosine_present": "object present", "cosine_absent": "object absent"}
_EVALUATED_COSINES = {**_COSINES, "cosine_blank": "image of one colour"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau:
    """Attributes:
    end: the step at which it ends, or the last one so far.
    left: whether it ended.
    """

    end: int
    left: bool


def plateau(history: History) -> Plateau | None:
    """Until when OID guessed: the last logged step at which the running mean of its loss is not
    below `LEFT`. None without a training, or if it never guessed."""
    steps, losses = _curve(history, "oid")
    if not len(steps):
        return None
    mean = np.array([losses[max(0, k + 1 - WINDOW) : k + 1].mean() for k in range(len(losses))])
    guessing = np.flatnonzero(mean >= LEFT)
    if not len(guessing):
        return None
    last = int(guessing[-1])
    return Plateau(end=int(steps[last]), left=last + 1 < len(steps))


def losses_chart(history: History) -> str | None:
    """OITC and OIIC; None without a training."""
    curves = _curves(history, _LOSSES)
    title = "Contrastive losses in training"
    return line_chart(curves, title, x_label="step", y_label="nats") if curves else None


def decision_chart(history: History) -> str | None:
    """OID's loss with the plateau in a colour of its own; None without a training."""
    steps, losses = _curve(history, "oid")
    if not len(steps):
        return None
    found = plateau(history)
    series = {"loss": (steps, losses)}
    if found is not None:
        on, after = steps <= found.end, steps >= found.end
        series = {f"on the plateau, to step {found.end:,}": (steps[on], losses[on])}
        if found.left:
            top = max(GUESSING, float(losses.max()))
            series["its end"] = np.array([found.end] * 2), np.array([0.0, top])
            series["after it"] = steps[after], losses[after]
    return line_chart(
        series,
        "OID: is the object there?",
        x_label="step",
        y_label="loss, nats",
        references={"guessing, ln 2": GUESSING},
    )


def cosines_chart(history: History) -> str | None:
    """Cosine of the steered image with its instruction, in training; None without one."""
    curves = _curves(history, _COSINES)
    title = "Cosine with the instruction in training: copied while the lines are one"
    return line_chart(curves, title, x_label="step", y_label="cosine") if curves else None


def evaluated_cosines_chart(history: History, name: str) -> str | None:
    """The same on the test images; None with fewer than two evaluations."""
    curves = _evaluations(history, name, _EVALUATED_COSINES)
    title = "Cosine with the object's name on test images"
    return line_chart(curves, title, x_label="step", y_label="cosine") if curves else None


def naming_chart(history: History, name: str) -> str | None:
    """Naming what the instruction names, and its copy floor, on the test images."""
    shown = {"p_acc1_conditioned": "steered image", "p_acc1_copy_floor": "copy floor"}
    curves = _evaluations(history, name, shown)
    shares = {key: (steps, np.asarray(values) / 100) for key, (steps, values) in curves.items()}
    title = "Naming what the instruction names, beside an image of one colour"
    if not shares:
        return None
    return line_chart(shares, title, x_label="step", y_label="first of all names", percent=True)


def deciding_chart(history: History, name: str, static: Mapping[str, float | None]) -> str | None:
    """How well present is told from absent on the test images, while it trained.

    Args:
      static: the same without an instruction, by stratum.
    """
    shown = {"oid_auc_overlooked": "overlooked objects", "oid_auc_all": "all objects"}
    curves = _evaluations(history, name, shown)
    references = {
        f"{stratum}, without an instruction": value
        for stratum, value in (("overlooked", static["overlooked"]), ("all", static["all"]))
        if value is not None
    }
    if not curves:
        return None
    return line_chart(
        curves,
        "Telling present from absent on test images, while it trained",
        x_label="step",
        y_label="area under the ROC curve",
        percent=True,
        references=references,
    )


def _curve(history: History, key: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [row for row in history if row.get(key) is not None]
    return np.array([row["step"] for row in rows]), np.array([row[key] for row in rows], np.float64)


def _curves(history: History, names: Mapping[str, str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {title: _curve(history, key) for key, title in names.items()}
    return {title: curve for title, curve in found.items() if len(curve[0])}


def _evaluations(
    history: History, name: str, keys: Mapping[str, str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Curves of an evaluator's values; {} unless there are two points."""
    named = {f"evaluate/{name}/{key}": title for key, title in keys.items()}
    curves = _curves(history, named)
    return curves if any(len(steps) > 1 for steps, _ in curves.values()) else {}
