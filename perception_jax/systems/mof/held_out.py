"""Loss of a LLaVA on held-out conversations. Letters: B rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from perception_jax.data.image_chats import ImageChats
from perception_jax.errors import DataError
from perception_jax.inference.batches import (
    CompiledPerMesh,
    current_mesh,
    divisible,
    fetched,
    joined,
    place,
)
from perception_jax.shard.mesh import batch_sharding, mesh_of
from perception_jax.systems.mof.task import chat_loss


class HeldOut(CompiledPerMesh):
    """Cross-entropy and accuracy of a model on all conversations of some data.

    Attributes:
      data: the conversations.
    """

    def __init__(
        self, data: ImageChats, *, batch_size: int, dtype: np.typing.DTypeLike, chunk: int = 256
    ):
        """Reads nothing yet.

        Args:
          batch_size: rows of a call.
          dtype: in which the model computes.
          chunk: tokens of each row whose logits are computed at a time.
        """
        super().__init__(functools.partial(_sums, dtype=dtype, chunk=chunk), batch_size=batch_size)
        self.data = data

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """Returns "loss" per predicted token (nats), "accuracy" and "tokens"."""
        mesh = mesh or mesh_of(model)
        size = divisible(self.batch_size, mesh)
        split = None if mesh is None else batch_sharding(mesh)
        run = self._on(mesh)

        def calls() -> Iterator[tuple[Any, int]]:
            for batch in self.data.parts(size):
                yield run(model, {key: place(x, split) for key, x in batch.items()}), 1

        with current_mesh(mesh):
            sums = joined(fetched(calls()))
        total, count, correct = (
            float(sums[name].sum(dtype=np.float64)) for name in ("total", "count", "correct")
        )
        if not count:
            raise DataError(
                "held-out conversations: expected answers to predict, found none. Does the "
                "template fit the tokenizer?"
            )
        return {"loss": total / count, "accuracy": correct / count, "tokens": count}


def _sums(
    model: nnx.Module, batch: Mapping[str, jax.Array], *, dtype: np.typing.DTypeLike, chunk: int
) -> dict[str, jax.Array]:
    """Sums over all rows, with an axis of one."""
    found = chat_loss(model, batch, chunk=chunk, dtype=dtype)
    return {"total": found.total[None], "count": found.count[None], "correct": found.correct[None]}
