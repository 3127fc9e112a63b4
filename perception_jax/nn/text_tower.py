"""The text tower of CLIP, EVA-CLIP and SigLIP. Letters: B batch, T tokens, D width, E embedding."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from perception_jax.nn import stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import Linear, lookup
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.taps import Taps, refuse_pool
from perception_jax.nn.towers import TowerOutput
from perception_jax.nn.transformer import Block
from perception_jax.ops.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Attributes:
    act: one of `nn.mlp.ACTIVATIONS`; it belongs to the weights.
    pool: "end" reads the causal tower at the largest id, which is the end token (CLIP); "last"
      reads a tower without any mask at the last position (SigLIP).
    projection_bias: whether the projection to the joint space has a bias.
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


class TextTower(nnx.Module):
    """Token ids to tokens and a joint embedding."""

    def __init__(self, config: TextConfig, embed_dim: int, *, rngs: nnx.Rngs):
        width = config.width
        self.pool = config.pool
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
        ids: Int[Array, "B T"],
        *,
        taps: Taps | None = None,
        dtype: np.typing.DTypeLike = jnp.float32,
        remat: bool = False,
    ) -> TowerOutput:
        """Encodes token ids.

        Pooled at the end token, what follows it changes nothing and T may be shorter than the
        context. Pooled at the last position, T must be the context, padded as in training.

        Returns:
          `tokens` after the final norm, `pooled` the row that is read.
        """
        refuse_pool(taps)
        count = ids.shape[1]
        x = lookup(self.token_embedding[...], ids, dtype)
        x = x + self.position_embedding[...][:count].astype(dtype)
        causal = jnp.tril(jnp.ones((1, 1, count, count), bool)) if self.pool == "end" else None
        out = stack.run(self.blocks, x, mask=causal, taps=taps, remat=remat)
        tokens = constrain(self.norm_final(out.x), "batch")
        if self.pool == "end":
            end = jnp.argmax(ids, axis=1)
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
