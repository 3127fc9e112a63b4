"""A contact sheet: many scenes on one picture, to look at.

    python -m perception_jax.data.scenes.sheet OUT.png --rows 4 --columns 6 --boxes

Shape letters: H W sheet.
"""

from __future__ import annotations

import argparse

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from perception_jax.data.records import Record, Source
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource

MARGIN = 10
LINE = 13
INK = (40, 42, 48)
BOX_COLOURS = ((230, 25, 75), (0, 110, 220), (20, 140, 60), (150, 30, 180), (230, 110, 0))


def contact_sheet(
    source: Source, rows: int, columns: int, *, boxes: bool = True
) -> UInt8[np.ndarray, "H W 3"]:
    """The source's first records in a grid, with their first caption and, if asked, their boxes."""
    records = [source[k] for k in range(min(rows * columns, len(source)))]
    height = max(np.asarray(record.image).shape[0] for record in records)
    width = max(np.asarray(record.image).shape[1] for record in records)
    font = ImageFont.load_default(11)
    step_x, step_y = width + MARGIN, height + MARGIN + 2 * LINE
    sheet = Image.new("RGB", (MARGIN + columns * step_x, MARGIN + rows * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for k, record in enumerate(records):
        left, top = MARGIN + k % columns * step_x, MARGIN + k // columns * step_y
        sheet.paste(_annotated(record, boxes), (left, top))
        for line, words in enumerate(_wrapped(_title(record), width, font)[:2]):
            draw.text((left, top + height + 1 + line * LINE), words, INK, font)
    return np.asarray(sheet)


def _annotated(record: Record, boxes: bool) -> Image.Image:
    image = Image.fromarray(np.asarray(record.image))
    if boxes:
        draw = ImageDraw.Draw(image)
        for k, item in enumerate(record.objects):
            left, top, right, bottom = item.box
            draw.rectangle(
                (left, top, right - 1, bottom - 1), outline=BOX_COLOURS[k % len(BOX_COLOURS)]
            )
    return image


def _title(record: Record) -> str:
    return record.captions[0] if record.captions else ", ".join(o.name for o in record.objects)


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The text in lines of at most `width` pixels, broken at spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def main() -> None:
    """Writes a contact sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="image file to write")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--canvas", type=int, default=192, help="pixels along a scene's side")
    parser.add_argument("--split", default="train", choices=("train", "test", "held_out"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--boxes", action="store_true", help="draw the objects' boxes")
    options = parser.parse_args()
    config = SceneConfig(canvas=options.canvas, split=options.split)
    source = ScenesSource(config, seed=options.seed, length=options.rows * options.columns)
    sheet = contact_sheet(source, options.rows, options.columns, boxes=options.boxes)
    Image.fromarray(sheet).save(options.out)


if __name__ == "__main__":
    main()
