"""Loss of a language model on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

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


class HeldOutLoss(CompiledPerMesh):
    """Cross-entropy and accuracy of a model on all batches of some data.

    Attributes:
      data: the data.
    """

    def __init__(
        self, loss: Callable[[Any, Any], NextTokenLoss], data: HeldOutData, *, batch_size: int
    ):
        """Reads nothing yet.

        Args:
          loss: of a model and a batch of `data`; traced by `jax.jit`.
          batch_size: rows of a call.
        """

        def sums(model: nnx.Module, batch: Any) -> dict[str, jax.Array]:
            found = loss(model, batch)  # an axis of one, over which calls are joined
            parts = {"total": found.total, "count": found.count, "correct": found.correct}
            return {name: x[None] for name, x in parts.items()}

        super().__init__(sums, batch_size=batch_size)
        self.data = data

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """Returns "loss" per predicted token (nats), "accuracy" and "tokens".

        Raises:
          DataError: no token is predicted.
        """
        mesh = mesh or mesh_of(model)
        split = None if mesh is None else batch_sharding(mesh)
        run = self._on(mesh)

        def calls() -> Iterator[tuple[Any, int]]:
            for batch in self.data.parts(divisible(self.batch_size, mesh)):
                yield run(model, jax.tree.map(lambda x: place(x, split), batch)), 1

        with current_mesh(mesh):
            sums = joined(fetched(calls()))
        total, count, correct = (
            float(sums[name].sum(dtype=np.float64)) for name in ("total", "count", "correct")
        )
        if not count:
            raise DataError(
                "held-out data: expected tokens to predict, found none. Does the template fit the "
                "tokenizer, and do answers begin within the length of a row?"
            )
        return {"loss": total / count, "accuracy": correct / count, "tokens": count}
