"""Draws a grid of scenes with their captions.

    python -m launch.contact_sheet --out=runs/scenes.png --split=test --boxes

The split selects the artists and the concepts, see `perception_jax.data.scenes.SceneConfig`.
"""

from __future__ import annotations

import pathlib

from absl import flags

from launch import common


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    flags.DEFINE_string("out", None, "Image file to write.", required=True, flag_values=values)
    flags.DEFINE_integer("rows", 4, "Rows of scenes.", flag_values=values)
    flags.DEFINE_integer("columns", 6, "Scenes in a row.", flag_values=values)
    flags.DEFINE_integer("canvas", 192, "Pixels along a scene's side.", flag_values=values)
    flags.DEFINE_enum(
        "split",
        "train",
        ("train", "test", "held_out"),
        "Which artists and concepts.",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Other scenes.", flag_values=values)
    flags.DEFINE_bool("boxes", False, "Draws the objects' boxes and names.", flag_values=values)


PROGRAM = common.Program(name="contact_sheet", define=define_flags)
"""The command line of this program."""


def run(parsed: common.Parsed) -> int:
    """Draws and writes the sheet; returns 0."""
    import numpy as np
    from PIL import Image

    from perception_jax.data.scenes.sample import SceneConfig
    from perception_jax.data.scenes.source import ScenesSource
    from perception_jax.viz import draw_boxes
    from perception_jax.viz.grid import grid

    values, out = parsed.flags, pathlib.Path(parsed.flags.out)
    config = SceneConfig(canvas=values.canvas, split=values.split)
    source = ScenesSource(config, seed=values.seed, length=values.rows * values.columns)
    images, captions = [], []
    for index in range(len(source)):
        record = source[index]
        image = np.asarray(record.image)
        if values.boxes:
            boxes = np.asarray([item.box for item in record.objects])
            image = draw_boxes(image, boxes, [item.name for item in record.objects])
        images.append(image)
        captions.append(record.captions[0])
    sheet = grid(images, captions, columns=values.columns, cell=values.canvas)
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(out)
    print(out)
    return 0


if __name__ == "__main__":
    common.start(PROGRAM, run)
