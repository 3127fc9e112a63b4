"""Boxes as arrays. Letters: M rows, P patches."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def patch_coverage(
    boxes: Float[Array, "M 4"], grid: tuple[int, int], size: int
) -> Float[Array, "M P"]:
    """Computes the share of each patch of a square image that a box covers.

    Args:
      boxes: xyxy in pixels of the image; a box of area 0 covers nothing.
      grid: rows and columns of patches.
      size: side of the image.
    """

    def overlap(low: Array, high: Array, count: int) -> Float[Array, "M n"]:
        edges = jnp.arange(count + 1) * (size / count)
        inside = jnp.minimum(high[:, None], edges[1:]) - jnp.maximum(low[:, None], edges[:-1])
        return jnp.maximum(inside, 0.0) * (count / size)

    across = overlap(boxes[:, 0], boxes[:, 2], grid[1])
    down = overlap(boxes[:, 1], boxes[:, 3], grid[0])
    return (down[:, :, None] * across[:, None, :]).reshape(len(boxes), -1)
