"""A contact sheet: images in equal cells with wrapped captions as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from perception_jax.errors import DataError
from perception_jax.viz.overlay import check_image

PAPER = (255, 255, 255)
"""Background colour."""
INK = (32, 34, 38)
"""Text colour."""
_MAT = (240, 240, 238)


def grid(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    captions: Sequence[str] | None = None,
    *,
    columns: int | None = None,
    cell: int = 192,
    gap: int = 12,
    font_size: int = 13,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Lays images out row by row on white paper.

    Args:
      images: uint8[H, W, 3] of any sizes; each is scaled to fit a cell, keeping its aspect ratio.
      captions: one per image, wrapped to the cell's width; a newline starts a new line.
      columns: cells per row; a roughly 4:3 sheet where None.
      cell: side of a cell in pixels.
      gap: space between cells and around the sheet, in pixels.
      font_size: caption size in pixels.

    Raises:
      DataError: no image, an image that is not uint8[H, W, 3], or captions of another number.
    """
    captions = [""] * len(images) if captions is None else captions
    if not images or len(captions) != len(images):
        raise DataError(
            "expected at least one image and one caption per image, found "
            f"{len(images)} images and {len(captions)} captions in grid"
        )
    if columns is None:
        columns = max(1, round(math.sqrt(len(images) * 4 / 3)))
    columns = min(columns, len(images))
    font = ImageFont.load_default(font_size)
    line_height = math.ceil(font_size * 1.35)
    lines = [wrap(text, cell, font) for text in captions]
    rows = [range(k, min(k + columns, len(images))) for k in range(0, len(images), columns)]
    heights = []
    for row in rows:
        most = max(len(lines[k]) for k in row)
        heights.append(cell + (gap // 2 + most * line_height if most else 0))
    sheet_size = (
        columns * cell + (columns + 1) * gap,
        sum(heights) + (len(rows) + 1) * gap,
    )
    sheet = Image.new("RGB", sheet_size, PAPER)
    draw = ImageDraw.Draw(sheet)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for column, k in enumerate(row):
            left = gap + column * (cell + gap)
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=_MAT)
            picture = _fit(images[k], cell, f"grid image {k}")
            offset = ((cell - picture.width) // 2, (cell - picture.height) // 2)
            sheet.paste(picture, (left + offset[0], top + offset[1]))
            y = top + cell + gap // 2
            for line in lines[k]:
                draw.text((left, y), line, fill=INK, font=font)
                y += line_height
        top += height + gap
    return np.array(sheet)


def _fit(image: np.ndarray, cell: int, where: str) -> Image.Image:
    check_image(image, where)
    height, width = image.shape[:2]
    scale = cell / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Small images keep their pixels visible instead of turning into a blur.
    enlarged = scale >= 2
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize(size, method)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Breaks text into lines of at most `width` pixels: at spaces, inside a word if it must."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            candidate = f"{line} {word}" if line else word
            if font.getlength(candidate) <= width:
                line = candidate
                continue
            if line:
                lines.append(line)
            line = word
            while font.getlength(line) > width and len(line) > 1:
                fits = max(1, _fitting_prefix(line, width, font))
                lines.append(line[:fits])
                line = line[fits:]
        if line:
            lines.append(line)
    return lines


def _fitting_prefix(word: str, width: int, font: ImageFont.FreeTypeFont) -> int:
    """Length of the longest prefix of `word` that is at most `width` pixels wide."""
    low, high = 0, len(word)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(word[:middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return low
