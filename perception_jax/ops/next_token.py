"""The loss of a causal language model, in chunks over tokens.

Letters: B batch, T tokens, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.ops.sharding import constrain

IGNORE = -100
"""Label of tokens that are not predicted, as in `transformers`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenLoss:
    """Sums over the predicted tokens of a batch, or of each of its rows.

    Attributes:
      total: cross-entropy, with the weights of the rows if there are any.
      row_count: predicted tokens of each row.
      row_correct: of these, those whose label has the largest logit.
    """

    total: Float[Array, ""]
    row_count: Int[Array, " B"]
    row_correct: Int[Array, " B"]

    @property
    def count(self) -> Int[Array, ""]:
        """Predicted tokens of all rows."""
        return jnp.sum(self.row_count)

    @property
    def correct(self) -> Int[Array, ""]:
        """Tokens of all rows that are predicted rightly."""
        return jnp.sum(self.row_correct)

    def mean(self) -> Float[Array, ""]:
        """Cross-entropy per predicted token of the global batch; 0 without any."""
        return self.total / jnp.maximum(self.count, 1)


Head = Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]]
"""Function from states to float32 logits, such as `Llama.logits`."""


def next_token_loss(
    hidden: Float[Array, "B T D"],
    head: Head,
    labels: Int[Array, "B T"],
    *,
    weights: Float[Array, " B"] | None = None,
    chunk: int = 256,
) -> NextTokenLoss:
    """Cross-entropy of the tokens that follow each token.

    Logits are computed for `chunk` positions of each row at a time, in float32, and (of several
    chunks) again in the backward pass, so that memory holds [B, chunk, V] and never [B, T, V]. On a
    mesh rows are split over the batch axes and the vocabulary over "tensor".

    Args:
      hidden: states after the last norm; position t predicts label t + 1.
      head: called for each chunk; its parameters get their gradient.
      labels: token ids, or `IGNORE`; another number outside the vocabulary makes the total NaN.
      weights: of rows, such as `group_weights`; None is 1 for all.
      chunk: positions of each row at a time.

    Raises:
      ConfigError: a chunk below 1.
    """
    if chunk < 1:
        raise ConfigError(f"next_token_loss: expected a chunk of at least 1 token, found {chunk}.")
    batch, length, _ = hidden.shape
    labels = jnp.concatenate([labels[:, 1:], jnp.full((batch, 1), IGNORE, labels.dtype)], axis=1)
    chunk = min(chunk, length)
    padding = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    labels = jnp.pad(labels, ((0, 0), (0, padding)), constant_values=IGNORE)
    chunks = (_in_chunks(hidden, chunk), _in_chunks(labels, chunk))

    def add(loss: NextTokenLoss, part: tuple[Array, Array]) -> tuple[NextTokenLoss, None]:
        return jax.tree.map(jnp.add, loss, _chunk_loss(part[0], head, part[1], weights)), None

    none = constrain(jnp.zeros(batch, jnp.int32), "batch")
    start = NextTokenLoss(total=jnp.zeros((), jnp.float32), row_count=none, row_correct=none)
    if chunks[1].shape[0] == 1:  # nothing to save: its backward pass comes next
        return add(start, jax.tree.map(lambda x: x[0], chunks))[0]
    return jax.lax.scan(jax.checkpoint(add), start, chunks)[0]


def group_weights(labels: Int[Array, "B T"], group: Int[Array, " B"]) -> Float[Array, " B"]:
    """Weights of rows with which `total` is the mean over groups of each group's own mean.

    So do trainers that average the losses of devices, each a mean over the device's tokens. A group
    without predicted tokens counts with a loss of 0.

    Args:
      labels: as of `next_token_loss`.
      group: rows with equal numbers belong together; the largest is less than B above the smallest.
    """
    counts = jnp.sum(labels[:, 1:] != IGNORE, axis=1, dtype=jnp.float32)
    place, rows = group - jnp.min(group), len(group)
    tokens = jax.ops.segment_sum(counts, place, rows)
    groups = jnp.sum(jax.ops.segment_sum(jnp.ones_like(counts), place, rows) > 0)
    return 1 / (groups * jnp.maximum(tokens[place], 1))


def _in_chunks(x: Array, chunk: int) -> Array:
    """[B, T, ...] as [T / chunk, B, chunk, ...]."""
    parts = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return constrain(jnp.moveaxis(parts, 1, 0), None, "batch")


def _chunk_loss(
    hidden: Float[Array, "B C D"],
    head: Head,
    labels: Int[Array, "B C"],
    weights: Float[Array, " B"] | None,
) -> NextTokenLoss:
    logits = constrain(head(hidden).astype(jnp.float32), "batch", None, "tensor")
    # A sum over a mask, since picking entries would gather a vocabulary that is split.
    own = jnp.arange(logits.shape[-1]) == labels[..., None]
    label_logit = jnp.sum(logits, axis=-1, where=own)
    counted = labels != IGNORE
    known = (labels >= 0) & (labels < logits.shape[-1])
    label_logit = jnp.where(known, label_logit, jnp.nan)
    losses = jax.nn.logsumexp(logits, axis=-1) - label_logit
    if weights is not None:
        losses = losses * weights[:, None]
    best = label_logit >= jnp.max(logits, axis=-1)
    return NextTokenLoss(
        total=jnp.sum(losses, where=counted),
        row_count=jnp.sum(counted, axis=1, dtype=jnp.int32),
        row_correct=jnp.sum(best & counted, axis=1, dtype=jnp.int32),
    )
