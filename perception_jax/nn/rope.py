"""Rotary positions over a grid (EVA-02, arXiv 2303.11331; timm's `RotaryEmbeddingCat`).

Letters: T tokens, H head width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """Cosines and sines by which neighbouring channel pairs of queries and keys are turned."""

    cos: Float[Array, "T H"]
    sin: Float[Array, "T H"]

    def turn(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """`x cos + rot(x) sin` with rot([x0, x1, …]) = [-x1, x0, …], in float32."""
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
        y = x * self.cos[:, None] + turned * self.sin[:, None]
        return y.astype(x.dtype)


def axial(
    grid: tuple[int, int], head_width: int, *, reference: tuple[int, int], prefix: int
) -> Rope:
    """Positions of a grid of patches, rows first, measured on a reference grid.

    Args:
      grid: rows and columns.
      head_width: H, divisible by 4.
      reference: the grid on which the model was trained; other grids are stretched over it.
      prefix: tokens in front that are not turned.
    """
    bands = 10000.0 ** (-np.arange(head_width // 4) / (head_width // 4))
    rows, columns = (
        np.arange(count) / count * base for count, base in zip(grid, reference, strict=True)
    )
    y = np.repeat(rows, grid[1])[:, None] * bands
    x = np.tile(columns, grid[0])[:, None] * bands
    angles = np.repeat(np.concatenate([y, x], axis=1), 2, axis=1)
    angles = np.concatenate([np.zeros((prefix, head_width)), angles])
    return Rope(jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32))
