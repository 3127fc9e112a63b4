"""Image arithmetic on the device. Letters: B batch, H W C image."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of CLIP's image normalisation."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of CLIP's image normalisation."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of the ImageNet normalisation."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of the ImageNet normalisation."""


def normalise(
    pixels: UInt8[Array, "*B H W C"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "*B H W C"]:
    """`(pixels / 255 - mean) / std`, computed in float32 and cast to `dtype` at the end.

    Args:
      pixels: uint8 in [0, 255], channels last.
      mean: per channel, in [0, 1].
      std: per channel, in [0, 1].
      dtype: of the result.
    """
    scaled = pixels.astype(jnp.float32) / 255.0
    centred = scaled - jnp.asarray(mean, jnp.float32)
    return (centred / jnp.asarray(std, jnp.float32)).astype(dtype)
