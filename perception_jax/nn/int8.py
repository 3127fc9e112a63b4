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
from jax.sharding import Sharding
from jaxtyping import Array, Float, Int8

from perception_jax.errors import ConfigError
from perception_jax.nn.lora import linear_layers

Model = TypeVar("Model", bound=nnx.Module)
"""Type of a model."""


def quantize(
    kernel: Float[Array, "*L inputs outputs"],
) -> tuple[Int8[Array, "*L inputs outputs"], Float[Array, "*L outputs"]]:
    """Returns the int8 kernel and its float32 scales: `kernel ≈ int8 * scale`.

    The error of a weight is at most half a scale. A column of zeros has the scale 0. Layers of a
    stack are converted one after the other, so that one layer alone is in float32 (on CPU, XLA
    converts all of a bfloat16 stack before a loop, here as everywhere).
    """
    if kernel.ndim > 2:
        return jax.lax.map(quantize, kernel)
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=-2) / 127.0
    divisor = jnp.where(scale == 0.0, 1.0, scale)[..., None, :]
    return jnp.round(kernel / divisor).astype(jnp.int8), scale


def quantized(
    path: str, kernel: jax.Array, shardings: tuple[Sharding, Sharding] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Converts the kernel of a layer in a compiled program; see `quantize`.

    Args:
      path: of the layer, for the messages.
      kernel: concrete, or traced inside of a compiled function or `nnx.eval_shape`.
      shardings: of the kernel and the scale; None leaves them to the compiler.

    Raises:
      ConfigError: a kernel of integers, or with NaN or infinite weights (seen only if concrete).
    """
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ConfigError(
            f"int8: expected floating weights in {path}, found {kernel.dtype}, which cannot be "
            "quantized (again)."
        )
    values, scale = jax.jit(quantize, out_shardings=shardings)(kernel)
    if not isinstance(scale, jax.core.Tracer) and not bool(jnp.isfinite(scale).all()):
        raise ConfigError(
            f"int8: expected finite weights in {path}, found NaN or infinity. Is the checkpoint "
            "damaged, or in a dtype with too small a range?"
        )
    return values, scale


def quantize_linear(model: Model, layers: str = ".*") -> Model:
    """Returns a copy of a model with int8 kernels in its linear layers, for inference.

    Args:
      model: its other leaves are shared with the copy; kernels are converted one by one. May be
        abstract under `nnx.eval_shape`.
      layers: a regular expression that matches whole paths (see `nn.lora.linear_layers`).

    Raises:
      ConfigError: it matches no layer, one that is quantized already, or one whose weights are
        integers, NaN or infinite.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    found = {path: x for path, x in linear_layers(model).items() if re.fullmatch(layers, path)}
    if not found:
        raise ConfigError(f"int8: expected a path of linear layers, found none like {layers!r}.")
    for path, layer in found.items():
        if layer.scale is not None:
            raise ConfigError(f"int8: {path} is quantized already.")
        kernel, scale = quantized(path, layer.kernel[...])
        layer.kernel, layer.scale = nnx.Param(kernel), nnx.Param(scale)
    return model
