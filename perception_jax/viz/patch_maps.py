"""Maps over the patches of an image, drawn over the image in grey.

Letters: C side of a panel, h w patch grid, H W image.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageFilter

from perception_jax.viz import colormap
from perception_jax.viz.formatting import Number
from perception_jax.viz.overlay import heatmap


def over(
    picture: UInt8[np.ndarray, "C C 3"], values: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "C C 3"]:
    """Draws a map over the image in grey."""
    low, high = float(values.min()), float(values.max())
    smooth = np.clip(enlarged(values, len(picture)), low, high)
    return heatmap(grey(picture), smooth, vmin=low, vmax=high)


def grey(picture: UInt8[np.ndarray, "C C 3"]) -> UInt8[np.ndarray, "C C 3"]:
    """Converts an image to grey RGB."""
    return np.array(Image.fromarray(picture).convert("L").convert("RGB"))


def enlarged(values: Float[np.ndarray, "h w"], side: int) -> Float[np.ndarray, "{side} {side}"]:
    """Resizes a map bicubically; bilinear interpolation of few patches has visible edges."""
    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


def blurred(values: Float[np.ndarray, "H W"], radius: Number) -> Float[np.ndarray, "H W"]:
    """A map of pixels, smoothed; its range becomes [0, 255]."""
    # Pillow blurs bytes alone; 255 levels are more than the eye tells apart in a map.
    levels = Image.fromarray(np.round(255 * colormap.normalise(values)).astype(np.uint8))
    return np.asarray(levels.filter(ImageFilter.GaussianBlur(radius)), np.float32)
