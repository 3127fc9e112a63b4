"""Visibility of overlapping placements and text on a canvas, in painting order.

Shape letters: H W canvas, N placements.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Bool, Int8, Integer
from PIL import Image, ImageDraw, ImageFont

from perception_jax.data.scenes.spec import DrawnText, Placement
from perception_jax.data.scenes.sprites import sprite_size

_NOTHING = -1
_TEXT = -2


class VisibilityMap:
    """Index of the topmost placement at each pixel of a canvas, by half coverage.

    A shape is the bool array of the pixels that a thing covers; its corner is the canvas pixel
    (x, y) of the shape's left top one.
    """

    def __init__(self, canvas: tuple[int, int]) -> None:
        """Creates an empty map; `canvas` is (height, width) in pixels."""
        self.canvas = canvas
        self._owner = np.full(canvas, _NOTHING, np.int8)
        self._totals: list[int] = []

    def _window(
        self, shape: Bool[np.ndarray, "h w"], corner: tuple[int, int]
    ) -> tuple[Int8[np.ndarray, "y x"], Bool[np.ndarray, "y x"]]:
        """The canvas under the shape and the shape, both cut to where they meet."""
        height, width = self.canvas
        (left, top), (tall, wide) = corner, shape.shape
        x0, y0 = min(max(left, 0), width), min(max(top, 0), height)
        x1, y1 = max(min(left + wide, width), x0), max(min(top + tall, height), y0)
        return self._owner[y0:y1, x0:x1], shape[y0 - top : y1 - top, x0 - left : x1 - left]

    def cover(self, shape: Bool[np.ndarray, "h w"], corner: tuple[int, int]) -> None:
        """Adds the next placement on top."""
        under, inside = self._window(shape, corner)
        under[inside] = len(self._totals)
        self._totals.append(int(shape.sum()))

    def cover_text(self, shape: Bool[np.ndarray, "h w"], corner: tuple[int, int]) -> None:
        """Adds a text on top."""
        under, inside = self._window(shape, corner)
        under[inside] = _TEXT

    def hidden_by(self, shape: Bool[np.ndarray, "h w"], corner: tuple[int, int]) -> float:
        """Returns the largest share of a placement that the shape would cover."""
        under, inside = self._window(shape, corner)
        lost = self._counts(under[inside])
        left = self._counts(self._owner) - lost
        return max(
            (1.0 - n / t for n, t, k in zip(left, self._totals, lost, strict=True) if k),
            default=0.0,
        )

    def _counts(self, owners: Int8[np.ndarray, "..."]) -> Integer[np.ndarray, " N"]:
        return np.bincount(owners[owners >= 0], minlength=len(self._totals))

    def masks(self) -> Bool[np.ndarray, "N H W"]:
        """Returns the visible pixels of each placement; no two overlap."""
        return self._owner == np.arange(len(self._totals), dtype=np.int8)[:, None, None]

    def shares(self) -> list[float]:
        """Returns the visible share of each placement's own pixels; 0 for one without pixels."""
        counts = self._counts(self._owner)
        return [float(n) / t if t else 0.0 for n, t in zip(counts, self._totals, strict=True)]


def shape_of(alpha: Image.Image, opacity: float = 1.0) -> Bool[np.ndarray, "h w"]:
    """Returns the pixels that are more than half opaque."""
    return np.asarray(alpha) * opacity > 127.5


def text_shape(text: DrawnText, canvas: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Returns the pixels that a text and its outline cover."""
    alpha = Image.new("L", canvas[::-1])
    write(ImageDraw.Draw(alpha), text, canvas, 255, 255)
    return shape_of(alpha)


def extent(placement: Placement) -> tuple[float, float]:
    """Returns width and height of the rotated sprite's bounding box, in shorter sides of the
    canvas."""
    wide, tall = sprite_size(placement)
    scale = placement.size / max(tall, wide)
    cosine = abs(math.cos(math.radians(placement.angle)))
    sine = abs(math.sin(math.radians(placement.angle)))
    return (wide * cosine + tall * sine) * scale, (wide * sine + tall * cosine) * scale


@functools.lru_cache(maxsize=128)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(pixels)


def write(
    draw: ImageDraw.ImageDraw,
    text: DrawnText,
    canvas: tuple[int, int],
    fill: int | tuple[int, int, int],
    outline: int | tuple[int, int, int],
) -> None:
    """Draws the word, centred on its place, in Pillow's built-in font, with an outline."""
    height, width = canvas
    pixels = max(4, round(text.size * min(height, width)))
    draw.text(
        (text.x * width, text.y * height),
        text.text,
        fill,
        _font(pixels),
        anchor="mm",
        stroke_width=outline_pixels(pixels),
        stroke_fill=outline,
    )


def outline_pixels(pixels: int) -> int:
    """Width of the outline around letters of that size."""
    return max(1, round(pixels / 12))


@functools.lru_cache(maxsize=1024)
def _word_box(word: str) -> tuple[float, float]:
    pixels = 100
    left, top, right, bottom = _font(pixels).getbbox(
        word, anchor="mm", stroke_width=outline_pixels(pixels)
    )
    return 2 * max(-left, right) / pixels, 2 * max(-top, bottom) / pixels


def text_extent(word: str, size: float) -> tuple[float, float]:
    """Width and height of a box around a written word, in shorter sides of the canvas."""
    wide, tall = _word_box(word)
    return wide * size, tall * size
