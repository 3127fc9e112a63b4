"""Draws many scenes on one picture, to look at.

python -m launch.contact_sheet --out=runs/scenes.png --boxes
"""

from __future__ import annotations

import pathlib
import sys

from launch import common

PROGRAM = common.Program(
    name="contact_sheet",
    description="Draws many scenes with their captions on one picture, to look at.",
    flags=(
        common.Flag("out", pathlib.Path, help="The image file to write.", required=True),
        common.Flag("rows", int, 4, "Rows of scenes."),
        common.Flag("columns", int, 6, "Scenes in a row."),
        common.Flag("canvas", int, 192, "Pixels along a scene's side."),
        common.Flag(
            "split",
            default="train",
            choices=("train", "test", "held_out"),
            help="Which artists and concepts.",
        ),
        common.Flag("seed", int, 0, "Other scenes."),
        common.Flag("boxes", bool, False, "Draws the objects' boxes and names."),
    ),
    config="none",
    examples=("python -m launch.contact_sheet --out=runs/scenes.png --split=test --boxes",),
)


def run(parsed: common.Parsed) -> int:
    """Draws and writes the sheet; returns 0."""
    import numpy as np
    from PIL import Image

    from perception_jax.data.scenes.sample import SceneConfig
    from perception_jax.data.scenes.source import ScenesSource
    from perception_jax.viz import draw_boxes
    from perception_jax.viz.grid import grid

    flags = parsed.flags
    config = SceneConfig(canvas=flags["canvas"], split=flags["split"])
    source = ScenesSource(config, seed=flags["seed"], length=flags["rows"] * flags["columns"])
    images, captions = [], []
    for index in range(len(source)):
        record = source[index]
        image = np.asarray(record.image)
        if flags["boxes"]:
            boxes = np.asarray([item.box for item in record.objects])
            image = draw_boxes(image, boxes, [item.name for item in record.objects])
        images.append(image)
        captions.append(record.captions[0])
    sheet = grid(images, captions, columns=flags["columns"], cell=flags["canvas"])
    flags["out"].parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(flags["out"])
    print(flags["out"])
    return 0


if __name__ == "__main__":
    sys.exit(common.main(PROGRAM, run))
