"""Models with position embeddings resized to another image size.

Towers resize positions as they run; a checkpoint for other programs has to have them resized, since
those programs resize in ways of their own or not at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
from flax import nnx

from perception_jax.models.towers import TowerConfig

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
