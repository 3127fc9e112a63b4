"""Horizontal bars of shares with their names, as one picture.

Letters: w width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from perception_jax.viz import colormap
from perception_jax.viz.axes import Number
from perception_jax.viz.grid import wrap
from perception_jax.viz.sheet import FONT, GAP, INK, PAPER

_TRACK = (232, 232, 229)
_FULL = colormap.categorical(2)
_LOW = (150, 152, 156)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShareBar:
    """Attributes:
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
    font, line = ImageFont.load_default(FONT), round(1.7 * FONT)
    strip = Image.new("RGB", (width, line * len(rows) + GAP), PAPER)
    pen = ImageDraw.Draw(strip)
    for k, row in enumerate(rows):
        top, left = GAP // 2 + k * line, GAP
        if name_width:
            pen.text((left, top + 2), _cut(row.name, name_width, font), fill=INK, font=font)
            left += name_width + GAP // 2
        box = (left, top + 4, left + bar_width - 1, top + line - 4)
        pen.rounded_rectangle(box, radius=4, fill=_TRACK)
        filled = round(row.share * (bar_width - 1))
        if filled:
            colour = _FULL if row.strong else _LOW
            pen.rounded_rectangle((*box[:2], left + filled, box[3]), radius=4, fill=colour)
        pen.text((left + bar_width + GAP // 2, top + 2), row.note, fill=INK, font=font)
    return np.array(strip)


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont) -> str:
    if font.getlength(text) <= width:
        return text
    return wrap(text, width - round(font.getlength("…")), font)[0] + "…"
