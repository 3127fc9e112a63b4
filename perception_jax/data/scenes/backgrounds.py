"""Backgrounds: flat, gradient, noise, texture, or a collage of distant, blurred objects.

A background is a function on the unit square, sampled at the canvas's pixels, so that one
background looks the same at every canvas size.

Shape letters: H W canvas.
"""

from __future__ import annotations

import functools
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from perception_jax.data.scenes.palette import lab
from perception_jax.data.scenes.spec import Background
from perception_jax.data.scenes.sprites import corner, drawing
from perception_jax.errors import DataError

TONES = MappingProxyType(
    {
        "red": (214, 88, 82),
        "orange": (243, 166, 84),
        "yellow": (248, 222, 116),
        "green": (112, 178, 118),
        "blue": (104, 148, 226),
        "purple": (148, 104, 188),
        "pink": (248, 176, 206),
        "brown": (148, 108, 80),
        "black": (48, 49, 54),
        "grey": (160, 163, 168),
        "white": (249, 249, 246),
    }
)
"""Softer versions of `palette.COLOURS`, each still nearest to its name, before which objects stand
out."""
NOISE_CELLS = (3, 6, 14)
"""Cells along each side of the octaves of the noise."""
COLLAGE_SIDE = 20
"""Pixels along the collage's shorter side before it is blown up, which is what blurs it."""
COLLAGE_STRENGTH = 0.32
"""Weight of the original colours of a collage's objects."""


@functools.cache
def contrast(first: str, second: str) -> float:
    """CIELAB distance between two background colours."""
    one, other = lab(np.array([TONES[first], TONES[second]], np.uint8))
    return float(np.linalg.norm(one - other))


def draw_background(background: Background, canvas: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """Draws the background without objects.

    Args:
      canvas: (height, width) in pixels.

    Raises:
      DataError: a kind or colour name that does not exist.
    """
    try:
        draw = _DRAW[background.kind]
        tones = [np.array(TONES[name], np.float32) for name in background.colours]
    except KeyError as error:
        raise DataError(
            f"expected a background kind out of {', '.join(_DRAW)} and colours out of "
            f"{', '.join(TONES)}, found {error} in {background}."
        ) from None
    rng = np.random.default_rng(background.seed)
    if background.kind == "collage":
        return _collage(background, tones[0], canvas)
    weight = draw(rng, canvas)[..., None]
    first, second = tones[0], tones[-1]
    return (first + weight * (second - first)).round().astype(np.uint8)


def _coordinates(canvas: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Columns x [1, W] and rows y [H, 1] of the pixel centres, in shorter sides."""
    height, width = canvas
    short = min(canvas)
    x = (np.arange(width, dtype=np.float32) + 0.5) / short
    y = (np.arange(height, dtype=np.float32) + 0.5) / short
    return x[None, :], y[:, None]


def _flat(rng: np.random.Generator, canvas: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    return np.zeros(canvas, np.float32)


def _gradient(rng: np.random.Generator, canvas: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Linear along a random direction, from one colour to the other."""
    angle = rng.uniform(0.0, 2.0 * np.pi)
    height, width = canvas
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / width - 0.5
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height - 0.5
    reach = (abs(np.cos(angle)) + abs(np.sin(angle))) / 2.0
    along = (x * np.cos(angle) + y * np.sin(angle)) / (2.0 * reach) + 0.5
    return np.clip(along, 0.0, 1.0).astype(np.float32)


def _noise(rng: np.random.Generator, canvas: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Three octaves of smoothed value noise."""
    height, width = canvas
    total = np.zeros(canvas, np.float32)
    for octave, cells in enumerate(NOISE_CELLS):
        grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        smooth = grid.resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(smooth) * 0.5**octave
    total /= sum(0.5**octave for octave in range(len(NOISE_CELLS)))
    return np.clip((total - 0.5) * 1.6 + 0.5, 0.0, 1.0)


def _texture(rng: np.random.Generator, canvas: tuple[int, int]) -> Float[np.ndarray, "H W"]:
    """Stripes, checks, dots, grid lines or rings, with edges one pixel soft."""
    pattern = rng.choice(("stripes", "checks", "dots", "grid", "rings"))
    period = rng.uniform(0.09, 0.24)
    angle = rng.uniform(0.0, np.pi)
    x, y = _coordinates(canvas)
    u = (x * np.cos(angle) + y * np.sin(angle)) / period
    v = (y * np.cos(angle) - x * np.sin(angle)) / period
    sharpness = period * min(canvas)
    if pattern == "stripes":
        inside = 0.25 - np.abs(u % 1.0 - 0.5)
    elif pattern == "checks":
        inside = np.sin(np.pi * u) * np.sin(np.pi * v) / np.pi
    elif pattern == "dots":
        inside = 0.28 - np.hypot(u % 1.0 - 0.5, v % 1.0 - 0.5)
    elif pattern == "grid":
        inside = 0.07 - np.minimum(np.abs(u % 1.0 - 0.5), np.abs(v % 1.0 - 0.5))
    else:
        centre = rng.uniform(0.0, 1.0, 2)
        inside = 0.25 - np.abs((np.hypot(x - centre[0], y - centre[1]) / period) % 1.0 - 0.5)
    return np.clip(inside * sharpness + 0.5, 0.0, 1.0).astype(np.float32)


def _collage(
    background: Background, tone: Float[np.ndarray, " 3"], canvas: tuple[int, int]
) -> UInt8[np.ndarray, "H W 3"]:
    """Far things, drawn at a few pixels and blown up: too blurred and pale to be counted."""
    scale = COLLAGE_SIDE / min(canvas)
    height, width = (max(1, round(side * scale)) for side in canvas)
    image = Image.new("RGB", (width, height), tuple(int(v) for v in tone.round()))
    for placement in background.placements:
        sprite = drawing(placement, (height, width))
        image.paste(sprite, corner(placement.x, placement.y, sprite.size, (height, width)), sprite)
    blurred = image.resize((canvas[1], canvas[0]), Image.Resampling.BICUBIC)
    mixed = tone + COLLAGE_STRENGTH * (np.asarray(blurred, np.float32) - tone)
    return mixed.round().astype(np.uint8)


_DRAW = {
    "flat": _flat,
    "gradient": _gradient,
    "noise": _noise,
    "texture": _texture,
    "collage": _flat,
}
