"""A page of panels: headings, rows of panels with captions, bars, and legends of maps.

Parts are strips of one width, put below each other by `stacked`. They are drawn by Pillow, so that
all text of a page has the font of its captions. Letters: C side of a panel, w width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from perception_jax.viz import colormap
from perception_jax.viz.formatting import Number
from perception_jax.viz.grid import INK, PAPER, grid, wrap

PANEL = 288
"""Side of a panel, pixels."""
GAP = 14
"""Gap between panels, pixels."""
FONT = 15
"""Font size of captions, pixels."""
HEADING = 19
"""Font size of headings, pixels."""
_TRACK = (232, 232, 229)
_FULL = colormap.categorical(2)
_LOW = (150, 152, 156)

Panel = tuple[UInt8[np.ndarray, "C C 3"], str]
"""An image and its caption."""


def width_of(columns: int) -> int:
    """Width of a row of panels, pixels."""
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
    """Draws a colour bar of maps with labels at its ends, in as many lines as the width needs."""
    font = ImageFont.load_default(FONT)
    start = ["Colours", "of", "a", "map:", "its", "lowest", "value"]
    end = ["its", "highest;", "beneath", "them", "the", "image", "in", "grey"]
    bar = Image.fromarray(colormap.apply(np.tile(np.linspace(0, 1, PANEL // 2), (FONT, 1))))
    pieces = [*start, bar, *end]
    places, x, y, space = [], GAP, GAP, font.getlength(" ")
    for piece in pieces:
        long, gap = (font.getlength(piece), space) if isinstance(piece, str) else (bar.width, GAP)
        x += gap if piece is bar and x > GAP else 0
        if x > GAP and x + long > width - GAP:
            x, y = GAP, y + round(1.6 * FONT)
        places.append((round(x), y))
        x += long + gap
    strip = Image.new("RGB", (width, y + FONT + GAP), PAPER)
    pen = ImageDraw.Draw(strip)
    for piece, (left, top) in zip(pieces, places, strict=True):
        if isinstance(piece, str):
            pen.text((left, top - 2), piece, fill=INK, font=font)
        else:
            strip.paste(piece, (left, top))
    return np.array(strip)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShareBar:
    """A bar of `share_bars`.

    Attributes:
      name: left of it.
      share: how much of it is filled, in [0, 1].
      note: right of it.
      strong: whether it stands out.
    """

    name: str
    share: Number
    note: str
    strong: bool = True


def share_bars(
    rows: Sequence[ShareBar], width: int, *, name_width: int, bar_width: int
) -> UInt8[np.ndarray, "_ w 3"]:
    """Bars below each other; a name that is too long is cut.

    Args:
      width: of the whole, pixels.
      name_width, bar_width: of these columns, pixels; 0 leaves names out.
    """
    font, height = ImageFont.load_default(FONT), round(1.7 * FONT)
    strip = Image.new("RGB", (width, height * len(rows) + GAP), PAPER)
    pen = ImageDraw.Draw(strip)
    for k, row in enumerate(rows):
        top, left = GAP // 2 + k * height, GAP
        if name_width:
            first, *rest = wrap(row.name, name_width - round(font.getlength("…")), font) or [""]
            pen.text((left, top + 2), first + "…" * bool(rest), fill=INK, font=font)
            left += name_width + GAP // 2
        box = (left, top + 4, left + bar_width - 1, top + height - 4)
        pen.rounded_rectangle(box, radius=4, fill=_TRACK)
        filled = round(row.share * (bar_width - 1))
        if filled:
            colour = _FULL if row.strong else _LOW
            pen.rounded_rectangle((*box[:2], left + filled, box[3]), radius=4, fill=colour)
        pen.text((left + bar_width + GAP // 2, top + 2), row.note, fill=INK, font=font)
    return np.array(strip)


def stacked(
    parts: Sequence[UInt8[np.ndarray, "_ _ 3"]], width: int
) -> UInt8[np.ndarray, "_ {width} 3"]:
    """Strips below each other; narrower ones are widened with paper."""
    return np.concatenate([_widened(part, width) for part in parts])


def padded_above(
    part: UInt8[np.ndarray, "_ w 3"], height: int
) -> UInt8[np.ndarray, "{height} w 3"]:
    """A strip with paper above it, as high as others beside it."""
    return np.pad(part, ((height - len(part), 0), (0, 0), (0, 0)), constant_values=PAPER[0])


def _widened(part: UInt8[np.ndarray, "h _ 3"], width: int) -> UInt8[np.ndarray, "h {width} 3"]:
    missing = width - part.shape[1]
    return np.pad(part, ((0, 0), (0, missing), (0, 0)), constant_values=PAPER[0])
