"""A page of panels: headings, rows of panels with captions, and what the colours of maps mean.

Parts are strips of one width, put below each other by `stacked`. Letters: C side of a panel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from perception_jax.viz import colormap
from perception_jax.viz.grid import grid, wrap

PANEL = 288
"""C, pixels."""
GAP = 14
PAPER = (255, 255, 255)
INK = (32, 34, 38)
FONT = 15
HEADING = 19

Panel = tuple[UInt8[np.ndarray, "C C 3"], str]
"""An image and its caption."""


def width_of(columns: int) -> int:
    """Of a row of panels, pixels."""
    return columns * (PANEL + GAP) + GAP


def panels(row: Sequence[Panel], *, columns: int) -> UInt8[np.ndarray, "_ _ 3"]:
    """Panels side by side, at most `columns` in a row."""
    images, captions = zip(*row, strict=True)
    return grid(images, captions, columns=columns, cell=PANEL, gap=GAP, font_size=FONT)


def heading(text: str, width: int) -> UInt8[np.ndarray, "_ {width} 3"]:
    """A large line above a row of panels, wrapped."""
    return _written(text, width, HEADING, 0)


def line(text: str, width: int, *, indent: int = 0) -> UInt8[np.ndarray, "_ {width} 3"]:
    """A line as large as captions, wrapped; indented by some pixels."""
    return _written(text, width, FONT, indent)


def _written(text: str, width: int, size: int, indent: int) -> UInt8[np.ndarray, "_ {width} 3"]:
    font, height = ImageFont.load_default(size), round(1.3 * size)
    lines = wrap(text, width - 2 * GAP - indent, font)
    strip = Image.new("RGB", (width, height * len(lines) + GAP // 2), PAPER)
    for k, words in enumerate(lines):
        place = (GAP + indent, GAP // 2 + k * height)
        ImageDraw.Draw(strip).text(place, words, fill=INK, font=font)
    return np.array(strip)


def legend(width: int) -> UInt8[np.ndarray, "_ {width} 3"]:
    """A bar of the colours of maps with what its ends mean."""
    strip = Image.new("RGB", (width, FONT + 2 * GAP), PAPER)
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(FONT)
    bar = colormap.apply(np.tile(np.linspace(0, 1, PANEL // 2), (FONT, 1)))
    start = "Colours of a map: its lowest value"
    pen.text((GAP, GAP - 2), start, fill=INK, font=font)
    x = 2 * GAP + round(font.getlength(start))
    strip.paste(Image.fromarray(bar), (x, GAP))
    end = "its highest; beneath them the image in grey"
    pen.text((x + PANEL // 2 + GAP, GAP - 2), end, fill=INK, font=font)
    return np.array(strip)


def stacked(
    parts: Sequence[UInt8[np.ndarray, "_ _ 3"]], width: int
) -> UInt8[np.ndarray, "_ {width} 3"]:
    """Strips below each other; narrower ones are widened with paper."""
    return np.concatenate([_widened(part, width) for part in parts])


def _widened(part: UInt8[np.ndarray, "h _ 3"], width: int) -> UInt8[np.ndarray, "h {width} 3"]:
    missing = width - part.shape[1]
    return np.pad(part, ((0, 0), (0, missing), (0, 0)), constant_values=PAPER[0])
