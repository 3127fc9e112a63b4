"""Bicubic resizing as PyTorch does it, for position tables and feature maps.

The weights are computed on the host and applied as two small matrix products, so the result is
differentiable and free of gathers. Letters: h w input grid, D width.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_PLAIN_A = -0.75
"""Cubic coefficient of torch's `interpolate(mode="bicubic")`."""
_ANTIALIAS_A = -0.5
"""Cubic coefficient of `antialias=True` and of Pillow."""


def bicubic(
    grid: Float[Array, "h w D"],
    size: tuple[int, int],
    *,
    antialias: bool = False,
    scale: tuple[float, float] | None = None,
) -> Float[Array, "H W D"]:
    """`torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` over two axes.

    Args:
      size: rows and columns of the result.
      antialias: widen the kernel when shrinking, as torch does (and then with a = -0.5).
      scale: factors for the coordinates where they are not size / input, as with torch's
        `scale_factor` and `recompute_scale_factor=False` (DINOv2's +0.1). Without antialias only.
    """
    factors = scale or (size[0] / grid.shape[0], size[1] / grid.shape[1])
    rows = _weights(grid.shape[0], size[0], factors[0], antialias)
    columns = _weights(grid.shape[1], size[1], factors[1], antialias)
    x = grid.astype(jnp.float32)
    x = jnp.einsum("Hh,hwD->HwD", jnp.asarray(rows), x, precision="highest")
    x = jnp.einsum("Ww,HwD->HWD", jnp.asarray(columns), x, precision="highest")
    return x.astype(grid.dtype)


@functools.lru_cache(maxsize=64)
def _weights(
    inputs: int, outputs: int, factor: float, antialias: bool
) -> Float[np.ndarray, "outputs inputs"]:
    weights = np.zeros((outputs, inputs))
    # Coordinates in float32, as torch has them: at large indices their rounding shows.
    step = np.float32(1.0 / factor)
    for row in range(outputs):
        centre = step * (np.float32(row) + np.float32(0.5))
        if antialias:
            _fill_antialiased(weights[row], float(centre), max(float(step), 1.0))
        else:
            _fill_plain(weights[row], float(centre - np.float32(0.5)))
    return weights.astype(np.float32)


def _fill_plain(row: np.ndarray, centre: float) -> None:
    """Four taps; those outside the grid fall on its border."""
    first = math.floor(centre) - 1
    for tap in range(first, first + 4):
        row[min(max(tap, 0), len(row) - 1)] += _cubic(tap - centre, _PLAIN_A)


def _fill_antialiased(row: np.ndarray, centre: float, stretch: float) -> None:
    """A stretched kernel; taps outside the grid are left out and the rest normalised."""
    support = 2.0 * stretch
    first = max(int(centre - support + 0.5), 0)
    last = min(int(centre + support + 0.5), len(row))
    for tap in range(first, last):
        row[tap] = _cubic((tap + 0.5 - centre) / stretch, _ANTIALIAS_A)
    row /= row.sum()


def _cubic(x: float, a: float) -> float:
    """Keys' cubic convolution kernel."""
    x = abs(x)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return 0.0
