"""Decoding of images on the host: whatever a record holds becomes uint8 RGB, or an `ImageError`.

Choices that a file format leaves open, made once here:

- The EXIF orientation is applied, so "the original image" of every box is the picture as shown;
  `exif=False` leaves the pixels as stored, as code that only opens and converts does.
- Alpha, palette transparency and colour keys are composited on white; `alpha="drop"` leaves them
  out, as Pillow's `convert("RGB")` does. `read_picture` leaves the colour mode as it is.
- 16-bit grey keeps its high byte, as Pillow does for 16-bit colour; 32-bit float is refused.
- CMYK and the other colour spaces go through Pillow's own conversion; ICC profiles are ignored.
- Of an animation or a multi-page file, the first frame is taken.

Letters: H W image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import Literal

import numpy as np
import PIL
import PIL.Image
from jaxtyping import UInt8

from perception_jax.data import pixel_budget, records
from perception_jax.errors import ImageError

MAX_PIXELS = 100_000_000
"""Images with more pixels than this are an error before decoding."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's names of the supported image formats."""

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),
    *(".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
)
"""File name suffixes, in lower case, by which image files are found in folders."""

Alpha = Literal["white", "drop"]
"""How transparency is handled: blended with white, or the alpha channel dropped."""

_ORIENTATION_TAG = 0x0112
_TRANSPOSES = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_TURNED = (5, 6, 7, 8)
"""Orientations that exchange width and height."""

_PART_PIXELS = 2**22
"""Pixels of the part of a large image that is converted at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """The size and orientation in the header of an image file.

    Attributes:
      stored: width and height of the pixels in the file.
      orientation: EXIF's, in [1, 8]; 1 for none.
    """

    stored: tuple[int, int]
    orientation: int = 1

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height of the picture after applying the orientation."""
        width, height = self.stored
        return (height, width) if self.orientation in _TURNED else (width, height)


def decode(
    image: records.Image | PIL.Image.Image,
    *,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    exif: bool = True,
    alpha: Alpha = "white",
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image of a record to RGB pixels, with the EXIF orientation applied.

    Args:
      image: uint8[H, W, 3] (returned as it is), an encoded file's bytes, a path, or a PIL image.
      name: what to call the image in an error, e.g. the record's id; a path names itself.
      max_pixels: refuse larger images, going by the file's header (Pillow's own limit, twice
        `PIL.Image.MAX_IMAGE_PIXELS`, also holds).
      exif, alpha: see the module.

    Raises:
      ImageError: empty, truncated, not an image, of an unsupported kind, or too large. No other
        exception and no warning of Pillow's leaves this function.
    """
    where = _where(image, name)
    if isinstance(image, np.ndarray):
        return _check_array(image, where, max_pixels)
    with pixel_budget.scope(), _opened(image, where) as picture:
        orientation = _checked_orientation(picture, where, max_pixels)
        return _turned(_to_rgb(picture, where, alpha), orientation if exif else 1)


def read_picture(
    image: records.Image | PIL.Image.Image,
    *,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    exif: bool = True,
) -> PIL.Image.Image:
    """Decodes as `decode`, in the colour mode of the file: RGBA, P, CMYK, L and so on.

    Grey of 16 bits becomes RGB.

    Raises:
      ImageError: as `decode`.
    """
    where = _where(image, name)
    if isinstance(image, np.ndarray):
        return PIL.Image.fromarray(_check_array(image, where, max_pixels))
    with pixel_budget.scope(), _opened(image, where) as picture:
        orientation = _checked_orientation(picture, where, max_pixels)
        picture.load()
        if picture.mode == "F" or picture.mode.startswith("I"):
            picture = PIL.Image.fromarray(_to_rgb(picture, where, "drop"))
        method = _TRANSPOSES.get(orientation) if exif else None
        return picture.copy() if method is None else picture.transpose(method)


def decode_picture(
    image: records.Image | PIL.Image.Image,
    *,
    name: str = "",
    exif: bool = True,
    alpha: Alpha = "white",
) -> PIL.Image.Image:
    """Decodes as `decode`, but to an RGB picture of Pillow, which saves copies before it resizes.

    Raises:
      ImageError: as `decode`.
    """
    picture = read_picture(image, name=name, exif=exif)
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    return PIL.Image.fromarray(decode(picture, name=name, exif=False, alpha=alpha))


def _checked_orientation(picture: PIL.Image.Image, where: str, max_pixels: int) -> int:
    """The orientation that a picture of allowed size still has once its pixels are loaded."""
    _check_size(*picture.size, where, max_pixels)
    pixel_budget.take(picture.size[0] * picture.size[1])
    # Pillow turns TIFF files itself when it loads them.
    return 1 if picture.format == "TIFF" else _orientation(picture)


def read_size(image: records.Image, *, name: str = "") -> tuple[int, int]:
    """Reads the width and height of the decoded picture from the header alone.

    Raises:
      ImageError: empty, not an image, or of an unsupported kind.
    """
    return read_header(image, name=name).shown


def read_header(image: records.Image, *, name: str = "") -> Header:
    """Size and orientation of an image; of an array, its own size. Raises as `read_size`."""
    where = _where(image, name)
    if isinstance(image, np.ndarray):
        height, width = _check_array(image, where, image.size).shape[:2]
        return Header((width, height))
    with _opened(image, where) as picture:
        header = Header(picture.size, _orientation(picture))
        # Pillow already gives the size of a TIFF file with the orientation applied.
        return Header(header.shown, header.orientation) if picture.format == "TIFF" else header


@contextlib.contextmanager
def _opened(image: bytes | os.PathLike | PIL.Image.Image, where: str) -> Iterator[PIL.Image.Image]:
    """An image file behind its header; whatever goes wrong inside is an `ImageError`."""
    try:
        if isinstance(image, PIL.Image.Image):
            with _quiet_pillow():
                yield image
            return
        with _quiet_pillow(), _open_file(image) as file:
            if not file.read(1):
                raise ImageError(
                    f"{where}: the file is empty. Fetch or export it again, or remove it."
                )
            file.seek(0)
            with PIL.Image.open(file, formats=FORMATS) as picture:
                yield picture
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{where}: expected an image file, found nothing there.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ImageError(
            f"{where}: expected a readable image file, found: {error.strerror}."
        ) from None
    except PIL.UnidentifiedImageError:
        raise ImageError(
            f"{where}: not an image of a supported format ({', '.join(FORMATS)}), or "
            "its header is damaged. Convert or remove it."
        ) from None
    except PIL.Image.DecompressionBombError as error:  # Pillow's own limit, above 178 million
        raise ImageError(f"{where}: {error} Shrink the file.") from None
    except Exception as error:  # Pillow's plugins raise whatever broken bytes lead them to.
        raise ImageError(
            f"{where}: cannot be decoded, most likely truncated or damaged "
            f"({type(error).__name__}: {error}). Fetch or export it again, or remove it."
        ) from error


def _where(image: records.Image | PIL.Image.Image, name: str) -> str:
    return " of ".join(part for part in (_describe(image), name and f"record {name!r}") if part)


def _describe(image: records.Image | PIL.Image.Image) -> str:
    if isinstance(image, PIL.Image.Image):
        return f"PIL image {image.mode} {image.width}×{image.height}"
    if isinstance(image, np.ndarray):
        return f"array {image.dtype}{list(image.shape)}"
    if isinstance(image, bytes):
        return f"encoded image ({len(image)} bytes)"
    return str(image)


def _check_array(image: np.ndarray, where: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or image.size == 0:
        raise ImageError(f"{where}: expected uint8[H, W, 3] with H, W ≥ 1. Convert it to RGB.")
    _check_size(image.shape[1], image.shape[0], where, max_pixels)
    return image


def _check_size(width: int, height: int, where: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{where}: has no pixels ({width}×{height}).")
    if width * height > max_pixels:
        raise ImageError(
            f"{where}: claims {width}×{height} pixels, more than the {max_pixels:,} allowed. "
            "Shrink the file, or raise max_pixels if you trust it."
        )


def _open_file(image: bytes | os.PathLike) -> io.BufferedIOBase:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    mode = os.stat(image).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # reading a named pipe may never end
        raise ImageError(f"{image}: expected an image file, found a pipe, socket or device.")
    return open(image, "rb")


def _orientation(picture: PIL.Image.Image) -> int:
    try:
        opened = getattr(picture, "fp", None)  # none behind the pixels of a PIL image in memory
        if picture.format == "PNG" and opened and not _png_text_behind_pixels(opened):
            # Pillow's own method for PNG decodes the whole picture to look behind it.
            exif = PIL.Image.Image.getexif(picture)
        else:
            exif = picture.getexif()
        found = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged metadata does not make the pixels bad
        return 1
    return found if found in range(1, 9) else 1


def _png_text_behind_pixels(file: io.BufferedIOBase) -> bool:
    """Whether a PNG file has chunks behind its pixels that may hold an orientation."""
    place, pixels = file.tell(), False
    try:
        file.seek(len(b"\x89PNG\r\n\x1a\n"))
        while len(start := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", start)
            if pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            pixels = pixels or kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


def _to_rgb(picture: PIL.Image.Image, where: str, alpha: Alpha) -> UInt8[np.ndarray, "H W 3"]:
    """The stored pixels as RGB; of large images part by part, so that few copies are held."""
    picture.load()
    if picture.mode == "F":
        raise ImageError(
            f"{where}: 32-bit float pixels have no fixed range. Convert it to 8 or 16 bits."
        )
    width, height = picture.size
    rows = max(1, _PART_PIXELS // width)
    if height <= rows:
        return np.array(_part_to_rgb(picture, alpha))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        part = picture.crop((0, top, width, bottom))
        pixels[top:bottom] = np.asarray(_part_to_rgb(part, alpha))
    return pixels


def _part_to_rgb(picture: PIL.Image.Image, alpha: Alpha) -> PIL.Image.Image:
    if picture.mode.startswith("I"):
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65535) >> 8
        return PIL.Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if alpha == "white" and picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", coloured.size, "white")
        return PIL.Image.alpha_composite(white, coloured).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _turned(pixels: UInt8[np.ndarray, "H W 3"], orientation: int) -> UInt8[np.ndarray, "H2 W2 3"]:
    """EXIF's orientation applied."""
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in _TURNED:
        pixels = pixels.transpose(1, 0, 2)
    return np.ascontiguousarray(pixels)


_quiet_lock = threading.Lock()
_quiet_depth = 0
_quiet_context: warnings.catch_warnings | None = None


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Ignores warnings raised inside Pillow, e.g. on damaged EXIF.

    `warnings.catch_warnings` alone is not safe with the loader's threads: two that overlap can
    restore each other's filters. So the first thread in sets the filter, the last one out resets.
    """
    global _quiet_depth, _quiet_context
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_context = warnings.catch_warnings()
            _quiet_context.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_context.__exit__(None, None, None)
                _quiet_context = None
