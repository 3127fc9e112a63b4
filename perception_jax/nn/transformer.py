"""The transformer block: residual steps of attention, optional cross-attention, and an MLP.

Letters: B batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.errors import ConfigError
from perception_jax.nn.attention import Attention
from perception_jax.nn.dropout import drop_path, dropout
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.stack.layer import Layer, Step, StepOutput

_ATTENTION, _CROSS, _MLP = 0, 1, 2
"""Places that drop something, each with a key of its own."""


class Block(nnx.Module):
    """Residual steps `x + f(x)`: attention, cross-attention to a memory if there is one, MLP.

    The steps can be called on their own, so that a method can put something between them.

    Args:
      attention, mlp: the modules inside the steps.
      norm: "pre": `x + f(norm(x))`; "post": `norm(x + f(x))` (the original Transformer, BERT);
        "res_post": `x + norm(f(x))` (Swin v2, EVA-02-E).
      norm_type: of the norms, made with a width and `eps`.
      cross: attention to `Layer.memory`, between the two others.
      layer_scale: start value of learned factors on the branches (DINOv2); None has none.
      dropout: rate on what each step adds; see `Layer.key`.
    """

    def __init__(
        self,
        width: int,
        attention: Attention,
        mlp: nnx.Module,
        *,
        eps: float,
        norm: Literal["pre", "post", "res_post"] = "pre",
        norm_type: Callable[..., nnx.Module] = LayerNorm,
        cross: Attention | None = None,
        layer_scale: float | None = None,
        dropout: float = 0.0,
    ):
        def scale() -> nnx.Param | None:
            return None if layer_scale is None else nnx.Param(jnp.full((width,), layer_scale))

        self.norm = norm
        self.dropout = dropout
        self.norm1 = norm_type(width, eps=eps)
        self.attention = attention
        self.cross = cross
        self.norm_cross = None if cross is None else norm_type(width, eps=eps)
        self.norm2 = norm_type(width, eps=eps)
        self.mlp = mlp
        self.scale1 = scale()
        self.scale_cross = None if cross is None else scale()
        self.scale2 = scale()

    @property
    def attends_memory(self) -> bool:
        """Whether there is cross-attention."""
        return self.cross is not None

    @property
    def steps(self) -> tuple[Step, ...]:
        """The sub-layers, in order."""
        cross = () if self.cross is None else (self.cross_step,)
        return (self.attention_step, *cross, self.mlp_step)

    def attention_step(self, x: Float[Array, "B T D"], layer: Layer | None = None) -> StepOutput:
        """Self-attention."""
        layer = layer or Layer()
        out = self.attention(
            self._before(x, self.norm1),
            mask=layer.mask,
            rope=layer.rope,
            tap=layer.tap,
            cache=layer.cache,
            key=_inner_key(layer, _ATTENTION),
        )
        x = self._added(x, out.x, self.norm1, self.scale1, layer, _ATTENTION)
        return StepOutput(x=x, attention=out.rows, cache=out.cache)

    def cross_step(self, x: Float[Array, "B T D"], layer: Layer) -> StepOutput:
        """Attention to the memory.

        Raises:
          ConfigError: there is none.
        """
        if layer.memory is None:
            raise ConfigError(
                "this block attends to a memory, but none was given: run the stack with "
                "`memory=` tokens."
            )
        out = self.cross(
            self._before(x, self.norm_cross),
            keys=layer.memory,
            mask=layer.memory_mask,
            tap=layer.cross_tap,
            key=_inner_key(layer, _CROSS),
        )
        x = self._added(x, out.x, self.norm_cross, self.scale_cross, layer, _CROSS)
        return StepOutput(x=x, cross=out.rows)

    def mlp_step(self, x: Float[Array, "B T D"], layer: Layer | None = None) -> StepOutput:
        """The MLP."""
        layer = layer or Layer()
        y = self.mlp(self._before(x, self.norm2), key=_inner_key(layer, _MLP))
        return StepOutput(x=self._added(x, y, self.norm2, self.scale2, layer, _MLP))

    def _before(self, x: Float[Array, "B T D"], norm: nnx.Module) -> Float[Array, "B T D"]:
        """Returns the input of a sub-layer."""
        return norm(x) if self.norm == "pre" else x

    def _added(
        self,
        x: Float[Array, "B T D"],
        y: Float[Array, "B T D"],
        norm: nnx.Module,
        scale: nnx.Param | None,
        layer: Layer,
        site: int,
    ) -> Float[Array, "B T D"]:
        """The residual `x` with what a sub-layer adds."""
        y = norm(y) if self.norm == "res_post" else y
        y = y if scale is None else y * scale[...].astype(y.dtype)
        y = dropout(y, self.dropout, layer.key_of(2 * site))
        y = drop_path(y, layer.drop_path, layer.key_of(2 * site + 1))
        return norm(x + y) if self.norm == "post" else x + y


def _inner_key(layer: Layer, site: int) -> Array | None:
    """A key for what a step's module drops inside."""
    return layer.key_of(2 * (_MLP + 1) + site)
