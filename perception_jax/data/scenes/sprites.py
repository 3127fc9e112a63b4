"""The drawings: `assets/sprites.zip`, one WebP per style and concept, read on request.

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
from PIL import Image, ImageOps

from perception_jax.data.scenes.concepts import by_name
from perception_jax.data.scenes.palette import tinted
from perception_jax.data.scenes.spec import STYLES, Placement
from perception_jax.errors import DataError

ARCHIVE = pathlib.Path(str(importlib.resources.files("perception_jax.data.scenes"))) / (
    "assets/sprites.zip"
)
"""Path of the archive."""


@functools.lru_cache(maxsize=4)
def _archive(path: pathlib.Path) -> dict[str, bytes]:
    """Every file of the archive, still encoded. Zip checks each against its CRC."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(
            f"expected the sprite archive at {path}, found it missing or damaged ({error}); "
            "reinstall the package."
        ) from error


@functools.lru_cache(maxsize=256)
def _decoded(path: pathlib.Path, concept: str, style: str) -> UInt8[np.ndarray, "H W 4"]:
    name = f"{style}/{concept}.webp"
    try:
        with Image.open(io.BytesIO(_archive(path)[name])) as image:
            sprite = np.array(image.convert("RGBA"))
    except (KeyError, OSError) as error:
        raise DataError(
            f"expected a WebP image {name!r} in {path}, found none that can be decoded; "
            "reinstall the package."
        ) from error
    sprite.flags.writeable = False
    return sprite


def load_sprite(
    concept: str, style: str, *, archive: pathlib.Path = ARCHIVE
) -> UInt8[np.ndarray, "H W 4"]:
    """Returns the RGBA drawing of a concept by one artist, cropped to its opaque pixels, read-only.

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


@functools.lru_cache(maxsize=2560)
def _plain(concept: str, style: str) -> Image.Image:
    """Premultiplied, so that scaling and turning do not mix in the colour of clear pixels.

    The cache holds every drawing: at most 95 MB.
    """
    return Image.fromarray(load_sprite(concept, style)).convert("RGBa")


@functools.lru_cache(maxsize=256)
def _tinted(concept: str, style: str, tint: str) -> Image.Image:
    return Image.fromarray(tinted(load_sprite(concept, style), tint)).convert("RGBa")


def _turned(image: Image.Image, placement: Placement, short: int) -> Image.Image:
    """The sprite (or its alpha) scaled, mirrored and rotated for a canvas of that shorter side."""
    scale = placement.size * short / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    if placement.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if placement.angle:
        # A clear margin, without which the sprite's cut edges would turn into stairs.
        image = ImageOps.expand(image, 1)
        image = image.rotate(placement.angle, Image.Resampling.BICUBIC, expand=True)
    return image


def sprite_size(placement: Placement) -> tuple[int, int]:
    """Width and height of the placement's sprite as it is stored."""
    return _plain(placement.concept, placement.style).size


def drawing(placement: Placement, canvas: tuple[int, int]) -> Image.Image:
    """Renders a placement's sprite: RGBA, coloured, mirrored, scaled, rotated.

    Args:
      canvas: (height, width) in pixels.
    """
    if placement.tint is None:
        sprite = _plain(placement.concept, placement.style)
    else:
        sprite = _tinted(placement.concept, placement.style, placement.tint)
    return _turned(sprite, placement, min(canvas)).convert("RGBA")


def outline(placement: Placement, canvas: tuple[int, int]) -> Image.Image:
    """Returns the alpha channel of `drawing` at lower cost."""
    alpha = _plain(placement.concept, placement.style).getchannel("a")
    return _turned(alpha, placement, min(canvas))


def corner(x: float, y: float, size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Left top pixel (x, y) of a drawing of `size` (width, height) that is centred on a place given
    in fractions of the canvas (height, width); it may be outside."""
    height, width = canvas
    return round(x * width - size[0] / 2), round(y * height - size[1] / 2)
