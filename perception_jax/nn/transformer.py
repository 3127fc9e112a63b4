"""The transformer block of CLIP, SigLIP, EVA and DINOv2: two residual steps, each with a norm.

Letters: B batch, T tokens, D width, N heads, Q query rows.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.nn.attention import Attention, Mask
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.rope import Rope
from perception_jax.nn.taps import LayerTap


class Block(nnx.Module):
    """`x += scale1 * attention(norm1(x)); x += scale2 * mlp(norm2(x))`.

    The two steps can be called on their own, so that a method can put something between them.

    Args:
      attention, mlp: the modules inside the steps.
      norm: "pre" normalises a step's input, "post" its output (EVA-02-E).
      layer_scale: start value of the learned factors (DINOv2); None has none.
    """

    def __init__(
        self,
        width: int,
        attention: Attention,
        mlp: nnx.Module,
        *,
        eps: float,
        norm: Literal["pre", "post"] = "pre",
        layer_scale: float | None = None,
    ):
        self.norm = norm
        self.norm1 = LayerNorm(width, eps=eps)
        self.attention = attention
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = mlp
        scaled = layer_scale is not None
        self.scale1 = nnx.Param(jnp.full((width,), layer_scale)) if scaled else None
        self.scale2 = nnx.Param(jnp.full((width,), layer_scale)) if scaled else None

    def attention_step(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask | None = None,
        rope: Rope | None = None,
        tap: LayerTap | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N Q T"] | None]:
        """The first residual step and, if tapped, the attention rows."""
        pre = self.norm == "pre"
        y, rows = self.attention(self.norm1(x) if pre else x, mask=mask, rope=rope, tap=tap)
        return x + _scaled(y if pre else self.norm1(y), self.scale1), rows

    def mlp_step(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The second residual step."""
        y = self.mlp(self.norm2(x)) if self.norm == "pre" else self.norm2(self.mlp(x))
        return x + _scaled(y, self.scale2)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask | None = None,
        rope: Rope | None = None,
        tap: LayerTap | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N Q T"] | None]:
        """Both steps."""
        x, rows = self.attention_step(x, mask=mask, rope=rope, tap=tap)
        return self.mlp_step(x), rows


def _scaled(y: Float[Array, "B T D"], scale: nnx.Param | None) -> Float[Array, "B T D"]:
    return y if scale is None else y * scale[...].astype(y.dtype)
