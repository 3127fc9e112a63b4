"""A model whose stored positions are those of another image size.

Towers resize positions as they run; a checkpoint for other programs has to have them resized, since
those programs resize in ways of their own or not at all.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
from flax import nnx

from perception_jax.nn import position

Model = TypeVar("Model", bound=nnx.Module)
Config = TypeVar("Config")


def resized(model: Model, config: Config, size: int) -> tuple[Model, Config]:
    """A CLIP, SigLIP or EVA-CLIP and its configuration for square images of another size.

    Other leaves are shared. Images of that size give what they gave before.

    Args:
      model: has `vision`, whose positions are a square grid after `prefix` extra rows.
      config: has `vision` with `image_size` and `patch_size`.
      size: pixels.
    """
    vision: Any = dataclasses.replace(config.vision, image_size=size)
    grid = size // vision.patch_size
    changed = jax.tree.map(lambda leaf: leaf, model)
    tower = changed.vision
    # As these towers do when they run: open_clip's way.
    table = position.resample(
        tower.position_embedding[...], (grid, grid), prefix=tower.prefix, antialias=True
    )
    tower.position_embedding = nnx.Param(table)
    return changed, dataclasses.replace(config, vision=vision)
