"""Models with position embeddings resized to another image size.

Towers resize positions as they run; a checkpoint for other programs has to have them resized, since
those programs resize in ways of their own or not at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
from flax import nnx

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
    vision: Any = dataclasses.replace(config.vision, image_size=size)
    grid = size // vision.patch_size
    changed = jax.tree.map(lambda leaf: leaf, model)
    changed.vision.position_embedding = nnx.Param(model.vision.positions((grid, grid)))
    return changed, dataclasses.replace(config, vision=vision)
