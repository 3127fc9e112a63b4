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
from perception_jax.inference.held_out import HeldOutLoss, TokenPredictions
from perception_jax.ops.next_token import NextTokenLoss
from perception_jax.systems.text.task import row_loss


class Perplexity(HeldOutLoss):
    """Cross-entropy, perplexity and accuracy of a model on all rows of some texts."""

    def __init__(
        self, data: PackedTexts, *, batch_size: int, dtype: np.typing.DTypeLike, chunk: int = 256
    ):
        """Reads nothing yet.

        Args:
          batch_size: rows of a call.
          dtype: in which the model computes.
          chunk: tokens of each row whose logits are computed at a time.
        """
        loss = functools.partial(_loss, dtype=dtype, chunk=chunk)
        super().__init__(TokenPredictions(loss, batch_size=batch_size), data)

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """Returns "loss" per predicted token (nats), "perplexity", "accuracy" and "tokens".

        Raises:
          DataError: no token is predicted.
        """
        found = super().__call__(model, mesh)
        perplexity = math.exp(min(found["loss"], 700.0))
        return {"loss": found["loss"], "perplexity": perplexity, **found}


def _loss(
    model: nnx.Module, rows: Int[jax.Array, "B 4 T"], *, dtype: np.typing.DTypeLike, chunk: int
) -> NextTokenLoss:
    batch = {key: rows[:, place] for place, key in enumerate(KEYS)}
    return row_loss(model, batch, chunk=chunk, dtype=dtype)
