"""Which images a path means, and names for what is made of each."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from perception_jax.data.images import SUFFIXES
from perception_jax.errors import ConfigError, DataError, ImageError


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
