"""How much of an object a centre crop leaves, from sizes alone.

An annotation whose box keeps less than half of its area is left out of training and evaluation:
this system is about objects near borders, which a crop would silently turn into errors. Letters: N
boxes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from perception_jax.data.processors import ImageProcessor
from perception_jax.data.views import require_square
from perception_jax.errors import ConfigError

MIN_VISIBLE = 0.5


def kept_share(
    boxes: Float[np.ndarray, "N 4"], sizes: Int[np.ndarray, "N 2"], processor: ImageProcessor
) -> Float[np.ndarray, " N"]:
    """The share of each box's area that the model's image still shows.

    The same as `processor(image).geometry.kept_share(boxes)`, for boxes of many images at once and
    without their pixels.

    Args:
      boxes: xyxy, pixels of the original.
      sizes: width and height of each box's image.
    """
    scale, offset = _placement(sizes, processor)
    mapped = boxes.reshape(-1, 2, 2) * scale[:, None] + offset[:, None]
    # Bars of a letterbox show nothing, so the original's own edges count too.
    low = np.maximum(offset, 0.0)
    high = np.minimum(sizes * scale + offset, processor.size)
    kept = np.clip(mapped, low[:, None], high[:, None])
    area, left = (np.prod(corners[:, 1] - corners[:, 0], axis=-1) for corners in (mapped, kept))
    return np.where(area > 0, left / np.where(area > 0, area, 1.0), 0.0)


def _placement(
    sizes: Int[np.ndarray, "N 2"], processor: ImageProcessor
) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, "N 2"]]:
    """Scale and offset from original to model pixels, per axis."""
    require_square(processor)
    if not processor.resizes:
        raise ConfigError("processor: expected one that resizes, found `resizes` False.")
    if processor.mode == "squash":
        return processor.size / sizes, np.zeros(sizes.shape)
    side = processor.resize or processor.size
    padding = np.zeros_like(sizes)
    shown = sizes
    if processor.mode == "llava_pad":
        shown = np.broadcast_to(sizes.max(axis=1, keepdims=True), sizes.shape)
        padding = (shown - sizes) // 2
    full = np.floor(side * shown / shown.min(axis=1, keepdims=True))
    surplus = full - processor.size
    crop = np.round(surplus / 2) if processor.mode == "tv_crop" else surplus // 2
    scale = full / shown
    return scale, padding * scale - crop
