"""The drawings: `assets/sprites.zip`, one WebP per style and concept, read when asked for.

Each process opens the archive on its first use and keeps what it decoded, so sources that draw
sprites pickle and work with any way of starting workers.

Shape letters: H W sprite.
"""

from __future__ import annotations

import functools
import importlib.resources
import io
import pathlib
import zipfile

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from perception_jax.data.scenes.concepts import by_name
from perception_jax.data.scenes.palette import tinted
from perception_jax.data.scenes.spec import STYLES, Placement
from perception_jax.errors import DataError

ARCHIVE = pathlib.Path(str(importlib.resources.files("perception_jax.data.scenes"))) / (
    "assets/sprites.zip"
)


@functools.lru_cache(maxsize=4)
def _archive(path: pathlib.Path) -> dict[str, bytes]:
    """Every file of the archive, still encoded. Zip checks each against its CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"expected the sprite archive at {path}, found it missing or damaged ({error}); "
            "reinstall the package or rebuild it with "
            "`python -m perception_jax.data.scenes.build_sprites`."
        ) from error


@functools.lru_cache(maxsize=4096)
def _decoded(path: pathlib.Path, concept: str, style: str) -> UInt8[np.ndarray, "H W 4"]:
    name = f"{style}/{concept}.webp"
    try:
        with Image.open(io.BytesIO(_archive(path)[name])) as image:
            sprite = np.array(image.convert("RGBA"))
    except (KeyError, OSError) as error:
        raise DataError(
            f"expected a WebP image {name!r} in {path}, found none that can be decoded; "
            "reinstall the package or rebuild the archive with "
            "`python -m perception_jax.data.scenes.build_sprites`."
        ) from error
    sprite.flags.writeable = False
    return sprite


def load_sprite(
    concept: str, style: str, *, archive: pathlib.Path = ARCHIVE
) -> UInt8[np.ndarray, "H W 4"]:
    """The RGBA drawing of a concept by one artist, cut to its opaque pixels, read-only.

    Args:
      concept: a concept's name, e.g. "red apple".
      style: one of `spec.STYLES`.
      archive: where the drawings are.

    Raises:
      DataError: unknown concept (the nearest names are suggested) or style, or a missing or
        damaged archive.
    """
    if style not in STYLES:
        raise DataError(f"expected a style out of {', '.join(STYLES)}, found {style!r}.")
    return _decoded(archive, by_name(concept).name, style)


@functools.lru_cache(maxsize=4096)
def _coloured(concept: str, style: str, tint: str | None, flip: bool) -> Image.Image:
    sprite = load_sprite(concept, style)
    if tint is not None:
        sprite = tinted(sprite, tint)
    return Image.fromarray(sprite[:, ::-1] if flip else sprite)


def placed(placement: Placement, canvas: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """A placement's sprite as it goes on the canvas, before its opacity.

    Args:
      canvas: (height, width) in pixels.

    Returns:
      The RGBA patch, coloured, mirrored, scaled and rotated, and its left top corner (x, y) on
      the canvas; it may reach beyond the canvas.
    """
    height, width = canvas
    patch = _coloured(placement.concept, placement.style, placement.tint, placement.flip)
    scale = placement.size * min(canvas) / max(patch.size)
    size = (max(1, round(patch.width * scale)), max(1, round(patch.height * scale)))
    patch = patch.resize(size, Image.Resampling.BICUBIC)
    if placement.angle:
        patch = patch.rotate(placement.angle, Image.Resampling.BICUBIC, expand=True)
    left = round(placement.x * width - patch.width / 2)
    top = round(placement.y * height - patch.height / 2)
    return patch, (left, top)
