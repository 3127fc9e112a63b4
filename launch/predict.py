"""Runs a system on an image, or on all images of a folder; writes a picture and JSON for each.

    python -m launch.predict encoder --model=scenes-clip --image=photo.jpg --text=dog \
        --out=runs/maps
    python -m launch.predict encoder --model=facebook/dinov2-small --image=photos --scale=2 \
        --out=runs/maps
    python -m launch.predict give --model=runs/give_scenes --image=photo.jpg \
        --instruction=kite --candidates=names.txt --out=runs/kite

The first argument is the system. encoder: maps of an image encoder (attention, the patches and
pixels that count for each text, patch features), and how well the texts fit. give: the same encoder
conditioned on an instruction: its maps, whether the object is there, and which of many objects are.
`python -m launch.predict SYSTEM --help` shows the system's flags.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

from absl import flags

from launch import common, systems


def define_flags(system: Any, values: flags.FlagValues) -> None:
    """Defines the flags that all systems have, and the system's own."""
    flags.DEFINE_string(
        "model",
        None,
        "A checkpoint folder, the name of shipped weights, or a hub id; give: adapters (a file, "
        "their folder, or scenes-give).",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string(
        "image", None, "An image, or a folder of them.", required=True, flag_values=values
    )
    flags.DEFINE_string("out", None, "Folder of the results.", required=True, flag_values=values)
    flags.DEFINE_float(
        "scale", 1.0, "Side of the input as a multiple of the model's own.", flag_values=values
    )
    system.define_flags(values)


PROGRAM = common.Program(
    name="predict",
    define={
        name: functools.partial(define_flags, system)
        for name, system in systems.predicting_programs().items()
    },
)
"""The command line of this program."""


def run(parsed: common.Parsed) -> int:
    """Predicts; returns 0, or 1 if no image of a folder can be used."""
    from perception_jax.inference.images import ImageRun

    system = systems.predicting_programs()[parsed.command]
    images = ImageRun.plan(pathlib.Path(parsed.flags.image), pathlib.Path(parsed.flags.out))
    return images.run(system.predictor(parsed.flags))


if __name__ == "__main__":
    common.start(PROGRAM, run)
