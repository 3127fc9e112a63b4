"""Weight-only int8: kernels of linear layers in a quarter of float32's memory, for serving.

Each output of a layer has one scale, the largest absolute weight of its column over 127 (symmetric,
without a zero point); activations stay as they are. Paths of the leaves do not change: `kernel`
becomes int8 and `scale` is added.
"""

from __future__ import annotations

import re
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from perception_jax.errors import ConfigError
from perception_jax.nn.lora import linear_layers

Model = TypeVar("Model", bound=nnx.Module)
"""Type of a model."""


def quantize(
    kernel: Float[Array, "*L inputs outputs"],
) -> tuple[Int8[Array, "*L inputs outputs"], Float[Array, "*L outputs"]]:
    """Returns the int8 kernel and its float32 scales: `kernel ≈ int8 * scale`.

    The error of a weight is at most half a scale. A column of zeros has the scale 0.
    """
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=-2) / 127.0
    divisor = jnp.where(scale == 0.0, 1.0, scale)[..., None, :]
    return jnp.round(kernel / divisor).astype(jnp.int8), scale


def quantize_linear(model: Model, layers: str = ".*") -> Model:
    """Returns a copy of a model with int8 kernels in its linear layers, for inference.

    Args:
      model: its other leaves are shared with the copy; kernels are converted one by one.
      layers: a regular expression that matches whole paths (see `nn.lora.linear_layers`).

    Raises:
      ConfigError: it matches no layer, or one that is quantized already.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    found = {path: x for path, x in linear_layers(model).items() if re.fullmatch(layers, path)}
    if not found:
        raise ConfigError(f"int8: expected a path of linear layers, found none like {layers!r}.")
    for path, layer in found.items():
        if layer.scale is not None:
            raise ConfigError(f"int8: {path} is quantized already.")
        kernel, scale = jax.jit(quantize)(layer.kernel[...])
        layer.kernel, layer.scale = nnx.Param(kernel), nnx.Param(scale)
    return model
