"""Loss of a LLaVA on held-out conversations."""

from __future__ import annotations

import functools

import numpy as np

from perception_jax.data.image_chats import ImageChats
from perception_jax.inference.held_out import HeldOutLoss
from perception_jax.systems.mof.task import chat_loss


class HeldOut(HeldOutLoss):
    """Cross-entropy and accuracy of a model on all conversations of some data."""

    def __init__(
        self, data: ImageChats, *, batch_size: int, dtype: np.typing.DTypeLike, chunk: int = 256
    ):
        """Reads nothing yet.

        Args:
          batch_size: rows of a call.
          dtype: in which the model computes.
          chunk: tokens of each row whose logits are computed at a time.
        """
        loss = functools.partial(chat_loss, dtype=dtype, chunk=chunk)
        super().__init__(loss, data, batch_size=batch_size)
