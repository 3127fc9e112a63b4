"""The eleven basic colour names, nearest colours, and recolouring.

The names are the basic colour terms of English (Berlin and Kay, 1969). Nearness is measured in
CIELAB (CIE 1976, white D65), where distances follow what people see.

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

_SHADES = {
    "red": ((150, 20, 30), (240, 75, 65), (250, 60, 40)),
    "orange": ((235, 110, 40), (255, 175, 90)),
    "yellow": ((255, 235, 130), (245, 195, 50)),
    "green": ((25, 90, 50), (150, 200, 70), (0, 205, 105)),
    "blue": ((30, 50, 120), (10, 15, 120), (80, 185, 245), (25, 120, 165), (150, 205, 240)),
    "purple": ((70, 40, 120), (175, 135, 220)),
    "pink": ((240, 60, 145), (255, 195, 215)),
    "brown": ((80, 50, 35), (180, 130, 90), (145, 68, 48)),
    "black": ((48, 48, 52), (48, 40, 60)),
    "grey": ((85, 88, 95), (185, 187, 192)),
    "white": ((228, 231, 235),),
}
"""Further shades that go by the name, so that navy and sky blue are both nearest to "blue"."""

NAMES = tuple(COLOURS)
"""Colour names."""
TINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black")
"""Colours of recoloured sprites."""

PLAIN = 1.25
"""Smallest ratio of the distances to the second nearest and the nearest name of a clear colour."""
DOMINANT = 0.5
"""Smallest share of the pixels of a dominating colour."""
TINT_RANGE = 90.0
"""Smallest luminance range, of 255, of a tinted sprite."""
TINT_DARK = 0.5
"""Factor on the tint for the darkest pixels."""
TINT_LIGHT = 0.4
"""Share of white mixed into the tint for the lightest pixels."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def lab(rgb: UInt8[np.ndarray, "*N 3"]) -> Float[np.ndarray, "*N 3"]:
    """Converts sRGB pixels to CIELAB, float32."""
    value = rgb.astype(np.float32) / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32
    )
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=-1)


_ANCHORS = [lab(np.array((COLOURS[name], *_SHADES[name]), np.uint8)) for name in NAMES]


def distances(rgb: UInt8[np.ndarray, "*N 3"]) -> Float[np.ndarray, "*N K"]:
    """CIELAB distance of each pixel to the nearest shade of each of the K names."""
    pixels = lab(rgb)[..., None, :]
    each = [np.linalg.norm(pixels - shades, axis=-1).min(axis=-1) for shades in _ANCHORS]
    return np.stack(each, axis=-1)


def nearest_colour(rgb: tuple[int, int, int]) -> str:
    """Returns the name of the colour nearest to an sRGB colour."""
    return NAMES[int(distances(np.array(rgb, np.uint8)).argmin())]


def shares(sprite: UInt8[np.ndarray, "H W 4"]) -> dict[str, float]:
    """Share of the sprite's pixels (alpha above one half) that plainly have each colour.

    Pixels between two names count for neither, nor do glass and smoke (alpha up to three
    quarters), so the shares may add up to less than 1.
    """
    alpha = sprite[..., 3]
    distance = distances(sprite[alpha > 191][:, :3])
    nearest, next_one = np.partition(distance, 1, axis=-1)[:, :2].T
    names = distance.argmin(axis=-1)[next_one >= nearest * PLAIN]
    counts = np.bincount(names, minlength=len(NAMES))
    total = max(1, int((alpha > 127).sum()))
    return {name: float(count) / total for name, count in zip(NAMES, counts, strict=True)}


def dominating_colour(sprite: UInt8[np.ndarray, "H W 4"]) -> str | None:
    """Returns the colour of most of the sprite's pixels, or None."""
    found = shares(sprite)
    name = max(found, key=found.__getitem__)
    return name if found[name] >= DOMINANT else None


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
