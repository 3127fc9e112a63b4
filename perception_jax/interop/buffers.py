"""Host buffers: aligned so that XLA's CPU client adopts them, and filled at memory speed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

_ALIGN = 64
"""Bytes; `jax.device_put` to a CPU device copies a buffer that is aligned to less."""
_TILE = (4096, 64)
"""Rows and columns of a result that are transposed at once: 1 MB of float32, which stays in the
second level of the cache."""
_PAD = 16
"""Elements after each row of a tile. Without them the rows of a power of two fall on the same few
lines of the cache."""


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> Shaped[np.ndarray, "*S"]:
    """`np.empty`, at an address that is a multiple of 64."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def copy_into(out: Shaped[np.ndarray, "*S"], source: Shaped[np.ndarray, "*S"]) -> None:
    """`out[...] = source` with a cast if the dtypes differ; fast for transposed matrices."""
    if out.dtype == source.dtype:
        # numpy copies dtypes it does not know (bfloat16) element by element.
        bits = np.dtype(f"u{out.dtype.itemsize}")
        out, source = out.view(bits), source.view(bits)
    if out.ndim == 2 and source.strides[0] < source.strides[1]:
        _copy_transposed(out, source)
    else:
        np.copyto(out, source, casting="unsafe")


def _copy_transposed(out: Shaped[np.ndarray, "R C"], source: Shaped[np.ndarray, "R C"]) -> None:
    """Tile by tile through a buffer in the order of the source (seven times as fast as numpy's own
    order for a 4096 × 1024 matrix of float32)."""
    rows, columns = (min(size, limit) for size, limit in zip(out.shape, _TILE, strict=True))
    buffer = np.empty((columns, rows + _PAD), out.dtype)
    for row in range(0, out.shape[0], _TILE[0]):
        for column in range(0, out.shape[1], _TILE[1]):
            place = slice(row, row + _TILE[0]), slice(column, column + _TILE[1])
            tile = source[place].T
            copied = buffer[: tile.shape[0], : tile.shape[1]]
            np.copyto(copied, tile, casting="unsafe")
            out[place] = copied.T


def contiguous(array: Shaped[np.ndarray, "*S"]) -> Shaped[np.ndarray, "*S"]:
    """The array itself if its elements are contiguous, else a copy."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    copy_into(out, array)
    return out
