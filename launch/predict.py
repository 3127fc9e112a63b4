"""Runs a system on images and writes, for each, a picture and JSON.

python -m launch.predict encoder --model=scenes-clip --image=photo.jpg --text=dog --out=runs/maps
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from launch import common
from launch.flags_of import check_flags
from launch.images import ImageRun, Seen


def _encoder(flags: Mapping[str, Any], images: ImageRun) -> int:
    """Where an image encoder looks: maps, and how well texts fit."""
    import perception_jax
    from perception_jax.systems.encoder.picture import draw
    from perception_jax.systems.encoder.predict import Explainer

    loaded = perception_jax.load(flags["model"])
    explain = Explainer(loaded, flags["text"], layer=flags["layer"], scale=flags["scale"])

    def look(image: pathlib.Path) -> Seen:
        prediction = explain(image)
        best = sorted(prediction.scores, key=lambda score: -score.cosine)[:3]
        return Seen(
            picture=draw(prediction, image.name),
            facts={"model": flags["model"], "image": str(image), **prediction.to_json()},
            line="".join(f"  {score.text}: {score.cosine:.3f}" for score in best),
        )

    return images.run(look)


def _give(flags: Mapping[str, Any], images: ImageRun) -> int:
    """What GiVE sees under instructions: where it looks, whether the object is there."""
    from perception_jax.data.text_lines import read_lines
    from perception_jax.systems.give.predict import Predictor, load_encoder
    from perception_jax.systems.give.showing.picture import draw

    candidates, captions = (
        () if flags[name] is None else read_lines(flags[name])
        for name in ("candidates", "captions")
    )
    encoder = load_encoder(flags["model"], backbone=flags["backbone"])
    predict = Predictor(
        encoder,
        flags["instruction"],
        candidates=candidates,
        captions=captions,
        alpha=flags["alpha"],
        scale=flags["scale"],
    )
    facts = {"model": flags["model"], "backbone": encoder.backbone.name}

    def look(image: pathlib.Path) -> Seen:
        prediction = predict(image)
        return Seen(
            picture=draw(prediction, image.name),
            facts={**facts, "image": str(image), **prediction.to_json()},
            line="".join(f"  {name}: {chance:.0%}" for name, chance in prediction.presences()[:5]),
        )

    return images.run(look)


SYSTEMS: Mapping[str, Callable[[Mapping[str, Any], ImageRun], int]] = {
    "encoder": _encoder,
    "give": _give,
}
"""By name: a function of the flags' values and the images that gives the exit code. A new system
adds its own, and below what it takes."""
FLAGS_OF = {
    "encoder": ("text", "layer"),
    "give": ("backbone", "instruction", "candidates", "captions", "alpha"),
}
"""Flags that not all systems take."""

PROGRAM = common.Program(
    name="predict",
    description=(
        "Runs a system on an image, or on all images in a folder, and writes a picture and a JSON "
        "file for each. encoder: where an image encoder looks (attention, patches and pixels that "
        "speak for each text, patch features), and how well the texts fit. give: the same encoder "
        "told by an instruction what to look for: where it then looks, whether the object is "
        "there, and which of many objects are."
    ),
    config="none",
    positional=(common.Argument("SYSTEM", "What to run.", choices=tuple(SYSTEMS)),),
    flags=(
        common.Flag(
            "model",
            help="A checkpoint folder, the name of shipped weights, or a hub id; give: adapters (a "
            "file, their folder, or scenes-give).",
            required=True,
        ),
        common.Flag("image", pathlib.Path, help="An image, or a folder of them.", required=True),
        common.Flag("out", pathlib.Path, help="Folder for the results.", required=True),
        common.Flag("scale", float, 1.0, "Side of the input as a multiple of the model's own."),
        common.Flag(
            "text", default=(), help="encoder: a text to look for; any number.", repeated=True
        ),
        common.Flag(
            "layer", int, -1, "encoder: whose attention is shown; negative counts from the end."
        ),
        common.Flag(
            "instruction",
            default=(),
            help='give: what to look for, e.g. "the kite", taken as it stands; any number.',
            repeated=True,
        ),
        common.Flag(
            "candidates", pathlib.Path, help="give: a file of objects to rank, one name a line."
        ),
        common.Flag(
            "captions",
            pathlib.Path,
            help="give: a file of captions, one a line; the nearest are shown.",
        ),
        common.Flag(
            "alpha", float, 1.0, "give: strength of the steering; 0 is the backbone alone."
        ),
        common.Flag("backbone", help="give: instead of the one that the adapters name."),
    ),
    examples=(
        "python -m launch.predict encoder --model=scenes-clip --image=photo.jpg --text=dog "
        "--text=bus --out=runs/maps",
        "python -m launch.predict encoder --model=facebook/dinov2-small --image=photos --scale=2 "
        "--out=runs/maps",
        "python -m launch.predict give --model=runs/give_scenes --image=photo.jpg "
        "--instruction=kite --candidates=names.txt --out=runs/told",
    ),
)


def run(parsed: common.Parsed) -> int:
    """Predicts; returns 0, or 1 if no image of a folder can be used."""
    system, flags = parsed.positional["SYSTEM"], parsed.flags
    check_flags(PROGRAM, system, flags, FLAGS_OF)
    return SYSTEMS[system](flags, ImageRun.plan(flags["image"], flags["out"]))


if __name__ == "__main__":
    sys.exit(common.main(PROGRAM, run))
