"""The pre-norm transformer block of CLIP, SigLIP and most ViTs. Letters: B batch, T tokens,
D width, N heads, Q query rows."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from perception_jax.nn.attention import Attention, Mask
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.taps import LayerTap


class PreNormBlock(nnx.Module):
    """`x += attention(norm1(x)); x += mlp(norm2(x))`."""

    def __init__(
        self, width: int, heads: int, mlp_dim: int, *, act: str, eps: float, rngs: nnx.Rngs
    ):
        self.norm1 = LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_dim, act=act, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask | None = None,
        context: Any = None,
        tap: LayerTap | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N Q T"] | None]:
        y, rows = self.attention(self.norm1(x), mask=mask, tap=tap)
        x = x + y
        return x + self.mlp(self.norm2(x)), rows
