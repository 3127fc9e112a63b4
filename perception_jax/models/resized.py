"""Models for images or patches of another size.

Towers resize positions as they run; a checkpoint for other programs has to have them resized, since
those programs resize in ways of their own or not at all.
Letters: k p sides of patches, C channels, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.models.towers import TowerConfig
from perception_jax.ops.resize import bicubic

Model = TypeVar("Model", bound=nnx.Module)
"""Type of a model."""
Config = TypeVar("Config")
"""Type of its configuration."""


def resized(model: Model, config: Config, size: int) -> tuple[Model, Config]:
    """Returns a two-tower model and its configuration for square images of another size.

    Other leaves are shared. Images of that size give what they gave before.

    Args:
      model: has `vision`, a tower that resizes its `positions`.
      config: has `vision` with `image_size` and `patch_size`.
      size: pixels.
    """
    changed = jax.tree.map(lambda leaf: leaf, model)
    changed.vision, vision = resized_tower(model.vision, config.vision, size)
    return changed, dataclasses.replace(config, vision=vision)


def resized_tower(tower: Model, config: Config, size: int) -> tuple[Model, Config]:
    """As `resized`, for an image tower alone.

    Args:
      tower: resizes its `positions`.
      config: a `TowerConfig`, or sizes with `image_size` and `patch_size`.
      size: pixels.
    """
    alone = isinstance(config, TowerConfig)
    own: Any = config.vision if alone else config
    grid = size // own.patch_size
    changed = jax.tree.map(lambda leaf: leaf, tower)
    changed.position_embedding = nnx.Param(tower.positions((grid, grid)))
    own = dataclasses.replace(own, image_size=size)
    return changed, dataclasses.replace(config, vision=own) if alone else own


def resized_kernel(kernel: Float[Array, "k k C D"], patch: int) -> Float[Array, "p p C D"]:
    """The kernel of a patch embedding for patches of another size.

    A patch that is resized to the new size gives nearly what it gave before: the pseudo-inverse
    resizing of FlexiViT (Beyer et al., arXiv 2212.08013, §3.4), bicubic and antialiased.

    Args:
      patch: the new side, pixels.
    """
    side, channels, width = len(kernel), *kernel.shape[2:]
    if patch == side:
        return kernel
    pixels = jnp.eye(side * side).reshape(side, side, -1)
    resize = np.asarray(bicubic(pixels, (patch, patch), antialias=True), np.float64)
    inverse = np.linalg.pinv(resize.reshape(patch * patch, -1).T)
    flat = np.asarray(kernel, np.float64).reshape(side * side, channels * width)
    found = (inverse @ flat).reshape(patch, patch, channels, width)
    return jnp.asarray(found, kernel.dtype)
