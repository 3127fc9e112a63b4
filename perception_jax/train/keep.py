"""Which checkpoints of a run are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


class Keep:
    """Selects the checkpoints to keep: the latest few, and the best by a metric."""

    def __init__(self, latest: int, metric: str) -> None:
        """Args: `keep` and `keep_best` of `TrainConfig`."""
        self._latest, self._metric = latest, metric.removeprefix("-")
        self._sign = -1.0 if metric.startswith("-") else 1.0
        self._scores: dict[int, float] = {}

    def consider(self, step: int, evaluation: Mapping[str, float]) -> None:
        """Notes what the evaluators found at a step."""
        value = evaluation.get(self._metric)
        if isinstance(value, int | float) and math.isfinite(value):
            self._scores[step] = self._sign * value

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Orbax's protocol for such policies."""
        del context
        kept = self.steps([c.step for c in checkpoints])
        return [c.step in kept for c in checkpoints]

    def steps(self, found: Sequence[int]) -> set[int]:
        """Those of the found checkpoints that are kept."""
        scores = {step: self._scores[step] for step in found if step in self._scores}
        best = max(scores, key=lambda step: (scores[step], step), default=None)
        return {*sorted(found)[-self._latest :], *({best} - {None})}
