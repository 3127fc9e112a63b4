"""What a language model predicts of held-out data: its loss, and what it has right in each row.

Letters: N rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int

from perception_jax.errors import DataError
from perception_jax.inference.batches import (
    CompiledPerMesh,
    current_mesh,
    divisible,
    fetched,
    joined,
    place,
)
from perception_jax.ops.next_token import NextTokenLoss
from perception_jax.shard.mesh import batch_sharding, mesh_of


@runtime_checkable
class HeldOutData(Protocol):
    """Protocol of data that an evaluation reads once, in order."""

    def parts(self, size: int) -> Iterator[Any]:
        """Yields batches of `size` rows; rows in which nothing is predicted fill up the last."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Predicted:
    """Sums over the tokens of some data.

    Attributes:
      total: cross-entropy of all tokens, nats.
      count: predicted tokens of each row, those that fill up the last batch included.
      correct: of these, those whose label has the largest logit.
    """

    total: float
    count: Int[np.ndarray, " N"]
    correct: Int[np.ndarray, " N"]


class TokenPredictions(CompiledPerMesh):
    """A model's predictions on any data whose batches have one shape, compiled once."""

    def __init__(self, loss: Callable[[Any, Any], NextTokenLoss], *, batch_size: int):
        """Compiles nothing yet.

        Args:
          loss: of a model and a batch; traced by `jax.jit`.
          batch_size: rows of a call.
        """

        def sums(model: nnx.Module, batch: Any) -> dict[str, jax.Array]:
            found = loss(model, batch)
            # The total has an axis of one, over which calls are joined.
            return {
                "total": found.total[None],
                "count": found.row_count,
                "correct": found.row_correct,
            }

        super().__init__(sums, batch_size=batch_size)

    def of(self, model: nnx.Module, data: HeldOutData, mesh: Mesh | None = None) -> Predicted:
        """The sums over all batches.

        Raises:
          DataError: there are none.
        """
        mesh = mesh or mesh_of(model)
        split = None if mesh is None else batch_sharding(mesh)
        size, run = divisible(self.batch_size, mesh), self._on(mesh)

        def calls() -> Iterator[tuple[Any, int]]:
            for batch in data.parts(size):
                yield run(model, jax.tree.map(lambda x: place(x, split), batch)), size

        with current_mesh(mesh):
            found = joined(fetched(calls()))
        total = float(found["total"].sum(dtype=np.float64))
        return Predicted(total=total, count=found["count"], correct=found["correct"])


class HeldOutLoss:
    """Cross-entropy and accuracy of a model on all batches of some data.

    Attributes:
      predictions: of the model, for evaluators of data of the same shape to share.
      data: the data.
    """

    def __init__(self, predictions: TokenPredictions, data: HeldOutData):
        """Reads nothing yet."""
        self.predictions, self.data = predictions, data

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """Returns "loss" per predicted token (nats), "accuracy" and "tokens".

        Raises:
          DataError: no token is predicted.
        """
        found = self.predictions.of(model, self.data, mesh)
        count = float(found.count.sum(dtype=np.float64))
        if not count:
            raise DataError(
                "held-out data: expected tokens to predict, found none. Does the template fit the "
                "tokenizer, and do answers begin within the length of a row?"
            )
        correct = float(found.correct.sum(dtype=np.float64))
        return {"loss": found.total / count, "accuracy": correct / count, "tokens": count}
