"""Runs a system on images and writes, for each, a picture and JSON.

python -m launch.predict encoder --model=scenes-clip --image=photo.jpg --text=dog --out=runs/maps
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from launch import common


def _encoder(flags: Mapping[str, Any]) -> int:
    """Where an image encoder looks: maps, and how well texts fit."""
    import tqdm

    import perception_jax
    from perception_jax.errors import ImageError
    from perception_jax.systems.encoder import files
    from perception_jax.systems.encoder.predict import Explainer

    images, out = files.find_images(flags["image"]), flags["out"]
    names = files.output_names(images, out)
    loaded = perception_jax.load(flags["model"])
    explain = Explainer(loaded, flags["text"], layer=flags["layer"], scale=flags["scale"])
    skipped = 0
    hidden = len(images) == 1 or not sys.stderr.isatty()
    pairs = list(zip(images, names, strict=True))
    for image, name in tqdm.tqdm(pairs, unit="image", dynamic_ncols=True, disable=hidden):
        try:
            prediction = explain(image)
        except ImageError as error:
            if not flags["image"].is_dir():
                raise
            skipped += 1
            tqdm.tqdm.write(f"skipped {error}")
            continue
        files.save(prediction, image, out, name, {"model": flags["model"]})
        best = sorted(prediction.scores, key=lambda score: -score.cosine)[:3]
        fits = "".join(f"  {score.text}: {score.cosine:.3f}" for score in best)
        tqdm.tqdm.write(f"{image.name}{fits}")
    print(f"{out}: pictures and JSON of {len(images) - skipped} images, {skipped} skipped")
    return int(skipped == len(images))


SYSTEMS: Mapping[str, Callable[[Mapping[str, Any]], int]] = {"encoder": _encoder}
"""By name: a function of the flags' values that gives the exit code. A new system adds its own."""

PROGRAM = common.Program(
    name="predict",
    description=(
        "Runs a system on an image, or on all images in a folder, and writes a picture and a JSON "
        "file for each. encoder: where an image encoder looks (attention, patches and pixels that "
        "speak for each text, patch features), and how well the texts fit."
    ),
    config="none",
    positional=(common.Argument("SYSTEM", "What to run.", choices=tuple(SYSTEMS)),),
    flags=(
        common.Flag(
            "model",
            help="A checkpoint folder, the name of shipped weights, or a hub id.",
            required=True,
        ),
        common.Flag("image", pathlib.Path, help="An image, or a folder of them.", required=True),
        common.Flag("out", pathlib.Path, help="Folder for the results.", required=True),
        common.Flag("text", default=(), help="A text to look for; any number.", repeated=True),
        common.Flag("layer", int, -1, "Whose attention is shown; negative counts from the end."),
        common.Flag("scale", float, 1.0, "Side of the input as a multiple of the model's own."),
    ),
    examples=(
        "python -m launch.predict encoder --model=scenes-clip --image=photo.jpg --text=dog "
        "--text=bus --out=runs/maps",
        "python -m launch.predict encoder --model=facebook/dinov2-small --image=photos --scale=2 "
        "--out=runs/maps",
    ),
)


def run(parsed: common.Parsed) -> int:
    """Predicts; returns 0, or 1 if no image of a folder can be used."""
    return SYSTEMS[parsed.positional["SYSTEM"]](parsed.flags)


if __name__ == "__main__":
    sys.exit(common.main(PROGRAM, run))
