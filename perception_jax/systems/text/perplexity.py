"""Perplexity of held-out texts. Letters: B rows, T tokens of a row."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Int

from perception_jax.data.packing import KEYS, PackedTexts
from perception_jax.inference.batches import Batched, divisible
from perception_jax.shard.mesh import mesh_of
from perception_jax.systems.text.task import row_loss


class Perplexity:
    """Cross-entropy and accuracy of a model on all rows of some texts.

    Attributes:
      data: the texts.
    """

    def __init__(
        self, data: PackedTexts, *, batch_size: int, dtype: np.typing.DTypeLike, chunk: int = 256
    ):
        """Reads nothing yet.

        Args:
          batch_size: rows of a call.
          dtype: in which the model computes.
          chunk: tokens of each row whose logits are computed at a time.
        """
        self.data = data
        self._run = Batched(
            functools.partial(_sums, dtype=dtype, chunk=chunk), batch_size=batch_size
        )

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """Returns "loss" per predicted token (nats), "perplexity", "accuracy" and "tokens"."""
        mesh = mesh or mesh_of(model)
        parts = self.data.parts(divisible(self._run.batch_size, mesh))
        sums = self._run.stream(model, parts, mesh)
        total, count, correct = (
            float(sums[name].sum(dtype=np.float64)) for name in ("total", "count", "correct")
        )
        loss = total / count
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": correct / count,
            "tokens": count,
        }


def _sums(
    model: nnx.Module, rows: Int[jax.Array, "B 4 T"], *, dtype: np.typing.DTypeLike, chunk: int
) -> dict[str, jax.Array]:
    """Sums over all rows, with an axis of one: what fills up a call counts nothing."""
    batch = {key: rows[:, place] for place, key in enumerate(KEYS)}
    found = row_loss(model, batch, chunk=chunk, dtype=dtype)
    return {"total": found.total[None], "count": found.count[None], "correct": found.correct[None]}
