"""Resampling of position embeddings. Letters: N stored rows, D width."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float

from perception_jax.errors import ConfigError
from perception_jax.ops.resize import bicubic


def resample(
    table: Float[Array, "N D"],
    grid: tuple[int, int],
    *,
    prefix: int,
    antialias: bool,
    offset: float = 0.0,
) -> Float[Array, "M D"]:
    """A table of `prefix` extra rows (kept) and a square grid (resized bicubically to `grid`).

    A table whose grid already is `grid` is returned as it is; a resized one is float32, so that one
    of half precision is not rounded a second time before the tower adds it.

    Args:
      prefix: rows of class or register tokens in front.
      antialias: True as open_clip does, False as DINOv2 and Hugging Face do.
      offset: added to the new side before the scale is computed (DINOv2's 0.1).

    Raises:
      ConfigError: the stored rows are no square grid.
    """
    side = math.isqrt(table.shape[0] - prefix)
    if side * side != table.shape[0] - prefix:
        raise ConfigError(
            f"position table with {table.shape[0]} rows: expected {prefix} and a square grid."
        )
    if grid == (side, side):
        return table
    stored = table[prefix:].reshape(side, side, -1)
    scale = ((grid[0] + offset) / side, (grid[1] + offset) / side) if offset else None
    resized = bicubic(stored.astype(jnp.float32), grid, antialias=antialias, scale=scale)
    return jnp.concatenate([table[:prefix], resized.reshape(grid[0] * grid[1], -1)])
