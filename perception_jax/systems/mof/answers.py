"""Answers of a LLaVA to test questions, exactly as asked for. Letters: N records."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool

from perception_jax.data.image_chats import ImageChats
from perception_jax.data.records import Source
from perception_jax.inference.held_out import TokenPredictions


class ExactAnswers:
    """Share of test questions that greedy decoding answers word by word as the record does.

    All tokens of the answer and of its end have the largest logit behind those before them, which
    is when greedy decoding writes that answer. No text is generated.

    Attributes:
      data: conversations of one question each.
    """

    def __init__(
        self,
        predictions: TokenPredictions,
        data: ImageChats,
        records: Source,
        *,
        together: int = 1,
    ):
        """Reads nothing yet.

        Args:
          records: of the data; the kind of each one's question is its group.
          together: consecutive records that count as one, right if all are: 2 for minimal pairs.
        """
        self._predictions, self.data = predictions, data
        self._records, self._together = records, together

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """Returns "accuracy" of all, and of each group under its name."""
        exact = self.rows(model, mesh).reshape(-1, self._together).all(axis=1)
        found = {"accuracy": float(exact.mean())}
        groups = self.groups
        for name in sorted(set(groups)):
            found[name] = float(exact[groups == name].mean())
        return found

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """The group of each question, or of those that count together."""
        rows = range(0, len(self._records), self._together)
        return np.array([self._records[row].questions[0].kind for row in rows])

    def rows(self, model: nnx.Module, mesh: Mesh | None = None) -> Bool[np.ndarray, " N"]:
        """Whether each record's question is answered exactly."""
        found = self._predictions.of(model, self.data, mesh)
        # A record that cannot be read has no labels; it counts as answered wrongly.
        exact = (found.correct == found.count) & (found.count > 0)
        return exact[: len(self._records)]
