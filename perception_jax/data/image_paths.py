"""Finding image files, and output names for results of each image."""

from __future__ import annotations

import collections
import logging
import pathlib
from collections.abc import Sequence

from perception_jax.data.images import SUFFIXES
from perception_jax.errors import ConfigError, DataError, ImageError

_LOGGER = logging.getLogger(__name__)
_SHOWN_KINDS = 6


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of a supported image format."""
    return name.lower().endswith(SUFFIXES)


def describe(names: Sequence[str], before: str = "") -> str:
    """Counts files by suffix: "3 .avif (as a/1.avif), 1 .json (as notes.json)".

    Args:
      before: put before it, unless there are none.
    """
    by_kind: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        by_kind[pathlib.PurePosixPath(name).suffix.lower() or "without an ending"].append(name)
    ranked = sorted(by_kind.items(), key=lambda item: (-len(item[1]), item[0]))
    parts = [f"{len(files)} {kind} (as {files[0]})" for kind, files in ranked[:_SHOWN_KINDS]]
    if len(ranked) > _SHOWN_KINDS:
        rest = sum(len(files) for _, files in ranked[_SHOWN_KINDS:])
        parts.append(f"{rest} with {len(ranked) - _SHOWN_KINDS} other endings")
    return before + ", ".join(parts) if parts else ""


def log_left_out(folder: pathlib.Path, images: int, names: Sequence[str]) -> None:
    """Warns of files in an image folder that are not recognised as images."""
    if names:
        _LOGGER.warning(
            "%s: %d images; left out: %s. Images are files ending in %s.",
            folder,
            images,
            describe(names),
            ", ".join(SUFFIXES),
        )


def find_images(path: pathlib.Path) -> list[pathlib.Path]:
    """The file itself, or the images in a folder (not below it), by name.

    What else is in the folder is counted in the log, hidden files excepted.

    Raises:
      ImageError: there is nothing at `path`.
      DataError: a folder without images.
    """
    if not path.exists():
        raise ImageError(f"{path}: expected an image file or a folder, found nothing there.")
    if not path.is_dir():
        return [path]
    visible = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    found = [file for file in visible if is_image(file.name) and not file.is_dir()]
    others = [f"{file.name}/" if file.is_dir() else file.name for file in visible]
    others = [name for name in others if not is_image(name)]
    if not found:
        raise DataError(
            f"{path}: expected images ({', '.join(SUFFIXES)}) in it, found none"
            f"{describe(others, ': only ')}."
        )
    log_left_out(path, len(found), others)
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
