"""Normalisation layers; statistics are float32 for every compute dtype.

Letters: B batch, D width, G groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.errors import ConfigError


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis with biased variance, scale and bias."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        variance = jnp.mean(y * y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(variance + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


ChannelNorm = LayerNorm
"""Layer norm over the channels of each pixel, `LayerNorm2d` in PyTorch code for NCHW images."""


class RmsNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,)))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalisation over all positions and a group of channels (Wu and He, arXiv 1803.08494).

    Args:
      width: channels, in the last axis (NHWC).
      groups: of neighbouring channels; a divisor of `width`.

    Raises:
      ConfigError: another number of groups.
    """

    def __init__(self, width: int, groups: int, *, eps: float):
        if groups < 1 or width % groups:
            raise ConfigError(
                f"group norm: expected a number of groups that divides {width} channels, found "
                f"{groups}."
            )
        self.groups = groups
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, x: Float[Array, "B *P D"]) -> Float[Array, "B *P D"]:
        y = x.astype(jnp.float32).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        y = y - jnp.mean(y, axis=(1, 3), keepdims=True)
        variance = jnp.mean(y * y, axis=(1, 3), keepdims=True)
        y = (y * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)
