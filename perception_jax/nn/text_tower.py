"""The text tower of CLIP, EVA-CLIP and SigLIP. Letters: B batch, T tokens, D width, E embedding."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.nn import stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import Linear, check_ids, lookup
from perception_jax.nn.mlp import TOWER_ACTIVATIONS, Mlp
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.taps import Taps, refuse_pool
from perception_jax.nn.towers import TowerOutput
from perception_jax.nn.transformer import Block
from perception_jax.ops.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Configuration of a text tower.

    Attributes:
      act: one of `nn.mlp.TOWER_ACTIVATIONS`; it belongs to the weights.
      pool: "end" reads the causal tower at the end token (CLIP); "last" reads a tower without any
        mask at the last position (SigLIP).
      projection_bias: whether the projection to the joint space has a bias.
      end_id: the end token; pooling "end" reads at its first occurrence. None reads at the largest
        id, as OpenAI's code does: right as long as no token is after the end token.
      start_id, pad_id: of the tokenizer, where the settings say them; the tower does not use them.

    Raises:
      ConfigError: a field of another type or out of range, heads that do not divide the width, or
        an end token that is none of the vocabulary.
    """

    vocab_size: int = 49408
    context: int = 77
    width: int
    depth: int
    heads: int
    mlp_dim: int
    act: str = "quick_gelu"
    eps: float = 1e-5
    pool: Literal["end", "last"] = "end"
    projection_bias: bool = False
    end_id: int | None = None
    start_id: int | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        settings.check_fields(self, _KINDS)
        if self.end_id is not None and not 0 <= self.end_id < self.vocab_size:
            raise ConfigError(
                f"text tower: expected an end token among its {self.vocab_size} ids, found "
                f"{self.end_id}. Is it the vocabulary of this model?"
            )


_ID = settings.Optional(settings.Integer(0, 2**31 - 1))
_KINDS = {
    **settings.TRANSFORMER,
    "vocab_size": settings.VOCABULARY,
    "context": settings.CONTEXT,
    "act": settings.Choice(TOWER_ACTIVATIONS),
    "pool": settings.Choice(("end", "last")),
    "projection_bias": settings.FLAG,
    "end_id": _ID,
    "start_id": _ID,
    "pad_id": _ID,
}


class TextTower(nnx.Module):
    """A text tower: token ids to tokens and a joint embedding."""

    def __init__(self, config: TextConfig, embed_dim: int, *, rngs: nnx.Rngs):
        width = config.width
        self.pool = config.pool
        self.end_id = config.end_id
        self.token_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.vocab_size, width))
        )
        self.position_embedding = nnx.Param(
            0.01 * jax.random.normal(rngs.params(), (config.context, width))
        )

        def block(rngs: nnx.Rngs) -> Block:
            gain = stack.residual_gain(config.depth)
            attention = Attention(width, config.heads, gain=gain, rngs=rngs)
            mlp = Mlp(width, config.mlp_dim, act=config.act, gain=gain, rngs=rngs)
            return Block(width, attention, mlp, eps=config.eps)

        self.blocks = stack.init(block, config.depth, rngs=rngs)
        self.norm_final = LayerNorm(width, eps=config.eps)
        self.projection = Linear(width, embed_dim, bias=config.projection_bias, rngs=rngs)

    def __call__(
        self,
        ids: Int[Array | np.ndarray, "B T"],
        *,
        taps: Taps | None = None,
        dtype: np.typing.DTypeLike = jnp.float32,
        remat: stack.Remat = False,
    ) -> TowerOutput:
        """Encodes token ids.

        Pooled at the end token, what follows it changes nothing and T may be shorter than the
        context. Pooled at the last position, T must be the context, padded as in training.

        Args:
          remat: what the backward pass recomputes; see `nn.stack.REMAT`.

        Returns:
          `tokens` after the final norm, `pooled` the row that is read.

        Raises:
          ConfigError: no integers [B, T]; texts longer than the context; outside of a compiled
            function also ids outside of the vocabulary and rows without the end token. A compiled
            function cannot raise: its tokens are NaN from an id outside of the vocabulary on.
        """
        refuse_pool(taps)
        self._check(ids)
        count = ids.shape[1]
        ids = jnp.asarray(ids)
        x = lookup(self.token_embedding[...], ids, dtype)
        x = x + self.position_embedding[...][:count].astype(dtype)
        causal = jnp.tril(jnp.ones((1, 1, count, count), bool)) if self.pool == "end" else None
        out = stack.run(self.blocks, x, mask=causal, taps=taps, remat=remat)
        tokens = constrain(self.norm_final(out.x), "batch")
        if self.pool == "end":
            end = first_end(ids, self.end_id)
            pooled = jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
        else:
            pooled = tokens[:, -1]
        return TowerOutput(
            embedding=constrain(self.projection(pooled), "batch"),
            pooled=pooled,
            tokens=tokens,
            hidden=out.hidden,
            attention=out.attention,
        )

    def _check(self, ids: Int[Array | np.ndarray, "B T"]) -> None:
        vocab_size, context = self.token_embedding.shape[0], self.position_embedding.shape[0]
        dtype = getattr(ids, "dtype", None)
        if dtype is None or ids.ndim != 2 or not jnp.issubdtype(dtype, jnp.integer):
            found = type(ids).__name__ if dtype is None else f"{dtype}{list(ids.shape)}"
            raise ConfigError(
                f"text tower: expected token ids, an array of integers [texts, tokens], found "
                f"{found}. The checkpoint's processor makes them from texts."
            )
        if ids.shape[1] > context:
            raise ConfigError(
                f"text tower: expected texts of at most {context} tokens, found {ids.shape[1]}."
            )
        values = check_ids(ids, vocab_size, "text tower")
        if values is not None and self.pool == "end" and self.end_id is not None:
            without = np.flatnonzero(~(values == self.end_id).any(axis=1))
            if without.size:
                raise ConfigError(
                    f"text tower: expected the end token {self.end_id} in every text, where the "
                    f"tower is read; found none in row {without[0]} (one of {without.size})."
                )


def first_end(ids: Int[Array, "B T"], end_id: int | None) -> Int[Array, "B"]:
    """Where a text ends: the first position of the end token, or of the largest id if `end_id` is
    None. A row without an end token gives 0, as in `transformers`."""
    return jnp.argmax(ids if end_id is None else ids == end_id, axis=1)


SIGLIP_END = 1
"""End token `</s>` of SigLIP's vocabulary, which is its padding too."""


def text_mask(ids: Int[Array, "B T"], pool: str, end_id: int | None = None) -> Bool[Array, "B T"]:
    """Mask of the tokens up to and including the first end token, whatever the padding is.

    Args:
      pool: how the text tower is read: at its end token ("end"), or at its last position ("last":
        without an end token all tokens count).
      end_id: the end token; None for the largest id ("end") or SigLIP's (`SIGLIP_END`, "last").
    """
    if pool == "end":
        end = first_end(ids, end_id)
    else:
        found = ids == (SIGLIP_END if end_id is None else end_id)
        end = jnp.where(found.any(axis=1), jnp.argmax(found, axis=1), ids.shape[1] - 1)
    return jnp.arange(ids.shape[1])[None] <= end[:, None]
