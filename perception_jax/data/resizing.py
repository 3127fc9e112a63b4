"""Resizing an image and cropping the result, without computing what the crop drops.

Letters: H W image.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import PIL.Image
from jaxtyping import Float, Int64

Resample = Literal["bicubic", "bilinear"]
"""Interpolation of the resizing."""
RESAMPLE: Mapping[Resample, PIL.Image.Resampling] = MappingProxyType(
    {
        "bicubic": PIL.Image.Resampling.BICUBIC,
        "bilinear": PIL.Image.Resampling.BILINEAR,
    }
)
"""Pillow's names of them."""


@functools.lru_cache(maxsize=1024)
def exact_part(
    size: tuple[int, int],
    resized: tuple[int, int],
    corner: tuple[int, int],
    kept: tuple[int, int],
    resample: Resample,
) -> tuple[float, float, float, float] | None:
    """Finds the part of an image whose resizing gives the very pixels that a crop would keep.

    For photographs of 4:3 at 336 pixels, for example, it exists, and saves a quarter of the work.

    Args:
      size, resized: width and height before and after resizing the whole image.
      corner: left and top of the crop, in the resized image.
      kept: its width and height.

    Returns:
      The part, xyxy in pixels of the image; None where Pillow would round differently, and where
      nothing is resized or cropped.
    """
    if resized in (size, kept):
        return None
    sides = zip(size, resized, corner, kept, strict=True)
    x, y = (_exact_interval(*axis, resample) for axis in sides)
    if x is None or y is None:
        return None
    part = (x[0], y[0], x[1], y[1])
    # From version 13 on Pillow resizes that axis first which saves more, and rounds in between.
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, size[::-1], np.uint8))
    left, top = corner
    whole = noise.resize(resized, RESAMPLE[resample])
    crop = whole.crop((left, top, left + kept[0], top + kept[1]))
    same = crop.tobytes() == noise.resize(kept, RESAMPLE[resample], box=part).tobytes()
    return part if same else None


def _exact_interval(
    length: int, resized: int, start: int, kept: int, resample: Resample
) -> tuple[float, float] | None:
    """The interval of an axis that Pillow resizes to `kept` samples by the very weights by which it
    resizes the whole axis to those from `start` on; None if rounding changes one."""
    if start < 0 or start + kept > resized:
        return None
    begin, end = start * length / resized, (start + kept) * length / resized
    if any(float(np.float32(x)) != x for x in (begin, end)):  # as Pillow stores them
        return None
    outputs, step = np.arange(kept) + 0.5, (end - begin) / kept
    part = _pillow_weights(begin + outputs * step, step, length, resample)
    step = length / resized
    whole = _pillow_weights((outputs + start) * step, step, length, resample)
    same = all(map(np.array_equal, part, whole))
    return (begin, end) if same else None


def _pillow_weights(
    centres: Float[np.ndarray, "kept"], step: float, length: int, resample: Resample
) -> tuple[Int64[np.ndarray, "kept"], Int64[np.ndarray, "kept taps"]]:
    """The first input of each output, and the weights of it and the following ones, in the 22 bits
    to which Pillow rounds them for 8-bit pixels."""
    stretch = max(step, 1.0)
    support = stretch * (2.0 if resample == "bicubic" else 1.0)
    first = np.maximum((centres - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centres + support + 0.5).astype(np.int64), length)
    taps = first[:, None] + np.arange(int(2 * support) + 3)
    x = np.abs((taps - centres[:, None] + 0.5) / stretch)
    if resample == "bicubic":
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    else:
        weights = np.maximum(1 - x, 0.0)
    weights = np.where(taps < last[:, None], weights, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return first, np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int64)
