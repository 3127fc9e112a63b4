"""The eleven basic colour names, and recolouring.

The names are the basic colour terms of English (Berlin and Kay, 1969).

Shape letters: H W image, N pixels.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from jaxtyping import Float, UInt8

COLOURS = MappingProxyType(
    {
        "red": (220, 30, 35),
        "orange": (255, 135, 0),
        "yellow": (255, 220, 40),
        "green": (40, 160, 60),
        "blue": (35, 100, 225),
        "purple": (125, 50, 175),
        "pink": (255, 130, 190),
        "brown": (125, 75, 40),
        "black": (25, 25, 28),
        "grey": (130, 133, 138),
        "white": (250, 250, 250),
    }
)
"""The sRGB colour drawn for each name."""

NAMES = tuple(COLOURS)
"""Colour names."""
TINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black")
"""Colours of recoloured sprites."""

TINT_RANGE = 90.0
"""Smallest luminance range, of 255, of a tinted sprite."""
TINT_DARK = 0.5
"""Factor on the tint for the darkest pixels."""
TINT_LIGHT = 0.4
"""Share of white mixed into the tint for the lightest pixels."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def lab(rgb: UInt8[np.ndarray, "*N 3"]) -> Float[np.ndarray, "*N 3"]:
    """Converts sRGB pixels to CIELAB (CIE 1976, white D65), float32; its distances follow what
    people see."""
    value = rgb.astype(np.float32) / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32
    )
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=-1)


def tinted(sprite: UInt8[np.ndarray, "H W 4"], colour: str) -> UInt8[np.ndarray, "H W 4"]:
    """Recolours a sprite in shades of one colour, keeping the order of luminance.

    The sprite's median luminance becomes the colour itself; from there it runs to a darker and to
    a lighter shade, so that most pixels are nearest to the colour's name.
    """
    luma = sprite[..., :3].astype(np.float32) @ _LUMA
    opaque = luma[sprite[..., 3] > 127]
    low, middle, high = np.percentile(opaque, (5, 50, 95)) if opaque.size else (0.0, 0.0, 0.0)
    shade = (luma - middle) / max(high - low, TINT_RANGE)
    target = np.array(COLOURS[colour], np.float32)
    darker, lighter = target * TINT_DARK, target + (255.0 - target) * TINT_LIGHT
    change = np.where(shade[..., None] < 0.0, target - darker, lighter - target)
    out = sprite.copy()
    toned = target + np.clip(shade, -1.0, 1.0)[..., None] * change
    out[..., :3] = np.clip(toned, 0, 255).round().astype(np.uint8)
    return out
