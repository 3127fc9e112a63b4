"""Images on disk in, pictures and JSON on disk out."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from perception_jax.data.images import SUFFIXES
from perception_jax.errors import ConfigError, DataError, ImageError, PerceptionError
from perception_jax.files import write_whole
from perception_jax.systems.encoder.picture import draw
from perception_jax.systems.encoder.predict import Prediction


def find_images(path: pathlib.Path) -> list[pathlib.Path]:
    """The file itself, or the images in a folder (not below it), by name.

    Raises:
      ImageError: there is nothing at `path`.
      DataError: a folder without images.
    """
    if not path.exists():
        raise ImageError(f"{path}: expected an image file or a folder, found nothing there.")
    if not path.is_dir():
        return [path]
    found = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    )
    if not found:
        raise DataError(f"{path}: expected images ({', '.join(SUFFIXES)}) in it, found none.")
    return found


def output_names(images: Sequence[pathlib.Path], out: pathlib.Path) -> list[str]:
    """What the files made for each image are called: its name without or, where two images would
    share that, with its ending.

    Raises:
      ConfigError: `out` is the images' own folder, where an image could be overwritten.
    """
    if any(out.resolve() == image.resolve().parent for image in images):
        raise ConfigError(
            f"{out} holds the images themselves: choose another folder for the results."
        )
    stems = [image.stem for image in images]
    unique = len({stem.casefold() for stem in stems}) == len(stems)
    return stems if unique else [image.name for image in images]


def save(
    prediction: Prediction,
    image: pathlib.Path,
    out: pathlib.Path,
    name: str,
    facts: Mapping[str, Any],
) -> None:
    """Writes `out/name.png` and `out/name.json`, each whole or not at all.

    Args:
      facts: go first into the JSON, e.g. the model's name.

    Raises:
      PerceptionError: a file cannot be written.
    """
    picture = io.BytesIO()
    Image.fromarray(draw(prediction, image.name)).save(picture, "PNG")
    text = json.dumps({**facts, "image": str(image), **prediction.to_json()}, ensure_ascii=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / f"{name}.png", picture.getvalue())
        write_whole(out / f"{name}.json", text + "\n")
    except OSError as error:
        raise PerceptionError(
            f"cannot write the results of {image} to {out}: {error}. Check the folder's "
            "permissions and the free space."
        ) from error
