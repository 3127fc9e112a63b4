"""The eleven basic colour names, what is nearest to which, and recolouring.

The names are the basic colour terms of English (Berlin and Kay, 1969). Nearness is measured in
CIELAB (CIE 1976, white D65), where distances follow what people see.

Shape letters: H W image, N pixels.
"""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Integer, UInt8

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
"""Name → sRGB."""

NAMES = tuple(COLOURS)
TINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black")
"""Colours that a recoloured sprite takes on plainly."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def lab(rgb: UInt8[np.ndarray, "*N 3"]) -> Float[np.ndarray, "*N 3"]:
    """CIELAB of sRGB pixels, float32."""
    value = rgb.astype(np.float32) / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32
    )
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=-1)


_LAB = lab(np.array(list(COLOURS.values()), np.uint8))


def nearest_index(rgb: UInt8[np.ndarray, "*N 3"]) -> Integer[np.ndarray, "*N"]:
    """Index into `NAMES` of the colour nearest to each pixel."""
    distance = np.linalg.norm(lab(rgb)[..., None, :] - _LAB, axis=-1)
    return distance.argmin(axis=-1)


def nearest_colour(rgb: tuple[int, int, int]) -> str:
    """Name of the colour nearest to one sRGB colour."""
    return NAMES[int(nearest_index(np.array([rgb], np.uint8))[0])]


def shares(sprite: UInt8[np.ndarray, "H W 4"]) -> dict[str, float]:
    """Share of each colour name among the sprite's opaque pixels (alpha above one half)."""
    pixels = sprite[sprite[..., 3] > 127][:, :3]
    counts = np.bincount(nearest_index(pixels), minlength=len(NAMES))
    return {
        name: float(count) / max(1, len(pixels)) for name, count in zip(NAMES, counts, strict=True)
    }


def tinted(sprite: UInt8[np.ndarray, "H W 4"], colour: str) -> UInt8[np.ndarray, "H W 4"]:
    """The sprite in shades of one colour: light and dark stay, hue becomes the colour's.

    The sprite's own luminance, stretched to its 5th to 95th percentile, runs from a darker to a
    lighter version of the colour, so that most pixels are nearest to that colour's name.
    """
    luma = sprite[..., :3].astype(np.float32) @ _LUMA
    low, high = np.percentile(luma[sprite[..., 3] > 127], (5, 95)) if sprite.any() else (0.0, 1.0)
    shade = np.clip((luma - low) / max(high - low, 24.0), 0.0, 1.0)[..., None]
    target = np.array(COLOURS[colour], np.float32)
    dark, light = target * 0.62, target + (255.0 - target) * 0.22
    out = sprite.copy()
    out[..., :3] = np.clip(dark + shade * (light - dark), 0, 255).round().astype(np.uint8)
    return out
