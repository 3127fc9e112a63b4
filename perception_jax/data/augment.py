"""Random changes of an image for training, with Pillow on uint8. Letters: H W image.

They make a model depend less on how an artist draws: outlines, shading, palette, exact shapes. No
setting mirrors an image.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from perception_jax import settings

CELLS = 3
"""Cells of the grid along each side that a warp moves."""

Window = tuple[int, int, int, int]
"""Left, top, width and height of a crop, in pixels."""

_SHARE = settings.Number(low=0.0, high=1.0)
_KINDS = {
    "min_area": settings.Number(above=0.0, high=1.0),
    "warp": settings.Number(low=0.0, high=0.25),
    "brightness": _SHARE,
    "contrast": _SHARE,
    "blur": settings.Number(low=0.0, high=0.1),
    "sharpen": settings.Number(low=0.0, high=10.0),
    "bits": settings.Integer(1, 8),
    "colour": settings.FLAG,
    "saturation": _SHARE,
    "hue": settings.Number(low=0.0, high=0.5),
    "grey": _SHARE,
    "invert": _SHARE,
}


def crop_window(width: int, height: int, min_area: float, rng: np.random.Generator) -> Window:
    """Draws a crop with the proportions of the image that keeps at least `min_area` of it."""
    side = np.sqrt(rng.uniform(min_area, 1.0))
    wide, tall = max(1, round(width * side)), max(1, round(height * side))
    left = int(rng.integers(0, width - wide + 1))
    top = int(rng.integers(0, height - tall + 1))
    return left, top, wide, tall


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageAugment:
    """Crops, warps, and changes light, sharpness and colour; by default it does nothing.

    A crop can make captions about places wrong, and the colour part those that name colours; it has
    a switch of its own. Left and right are never exchanged.

    Attributes:
      min_area: smallest share of the area that a crop keeps, in (0, 1]; it is enlarged again.
      warp: largest shift of the corners, as a fraction of each side; points of a grid inside move
        by up to half of it in addition.
      brightness, contrast: largest relative change, in [0, 1].
      blur: largest standard deviation of a Gaussian, in shorter sides of the image; half of the
        images stay as they are.
      sharpen: largest strength of sharpening, 0 for none.
      bits: fewest bits of each channel that are kept; 8 keeps all.
      colour: whether the following settings apply.
      saturation: largest relative change, in [0, 1].
      hue: largest shift, in turns of the colour circle, at most 0.5.
      grey: probability that the image loses its colours.
      invert: probability that the image becomes its negative.

    Raises:
      ConfigError: a setting of another type or out of range.
    """

    min_area: float = 1.0
    warp: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    blur: float = 0.0
    sharpen: float = 0.0
    bits: int = 8
    colour: bool = False
    saturation: float = 0.0
    hue: float = 0.0
    grey: float = 0.0
    invert: float = 0.0

    def __post_init__(self) -> None:
        settings.check_fields(self, _KINDS)

    @classmethod
    def from_settings(cls, **fields: Any) -> ImageAugment | None:
        """The augmentation with these fields; None if it does nothing."""
        made = cls(**fields)
        return None if made == cls() else made

    @property
    def moves(self) -> bool:
        """Whether things move: boxes of the original then no longer fit."""
        return self.min_area < 1 or self.warp > 0

    def __call__(
        self, image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Returns the changed image; the same generator state gives the same pixels."""
        return self.view(image, rng)[0]

    def view(
        self, image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "H W 3"], Window]:
        """Returns the changed image, and the part of the original that it shows."""
        height, width = image.shape[:2]
        whole = (0, 0, width, height)
        window = crop_window(width, height, self.min_area, rng) if self.min_area < 1 else whole
        picture = Image.fromarray(image)
        if self.warp:
            picture = _warped(picture, window, self.warp, rng)
        elif window != whole:
            left, top, wide, tall = window
            box = (left, top, left + wide, top + tall)
            picture = picture.resize(picture.size, Image.Resampling.BICUBIC, box=box)
        picture = self._lit(picture, rng)
        if self.colour:
            picture = self._coloured(picture, rng)
        return np.asarray(picture), window

    def _lit(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        for enhance, most in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
        ):
            if most:
                picture = enhance(picture).enhance(rng.uniform(1 - most, 1 + most))
        if self.blur and rng.random() < 0.5:
            radius = rng.uniform(0, self.blur) * min(picture.size)
            picture = picture.filter(ImageFilter.GaussianBlur(radius))
        if self.sharpen:
            picture = ImageEnhance.Sharpness(picture).enhance(rng.uniform(1, 1 + self.sharpen))
        if self.bits < 8:
            picture = ImageOps.posterize(picture, int(rng.integers(self.bits, 9)))
        return picture

    def _coloured(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        if self.saturation:
            factor = rng.uniform(1 - self.saturation, 1 + self.saturation)
            picture = ImageEnhance.Color(picture).enhance(factor)
        if self.hue:
            shift = round(256 * rng.uniform(-self.hue, self.hue))
            hues, *rest = picture.convert("HSV").split()
            hues = Image.fromarray(np.asarray(hues) + np.uint8(shift % 256))  # goes round
            picture = Image.merge("HSV", (hues, *rest)).convert("RGB")
        if self.grey and rng.random() < self.grey:
            picture = ImageOps.grayscale(picture).convert("RGB")
        if self.invert and rng.random() < self.invert:
            picture = ImageOps.invert(picture)
        return picture


def _warped(
    picture: Image.Image, window: Window, most: float, rng: np.random.Generator
) -> Image.Image:
    """The window, seen through a grid whose points have moved; none leaves the image."""
    width, height = picture.size
    left, top, wide, tall = window
    steps = np.linspace(0.0, 1.0, CELLS + 1)
    ends = np.stack([1.0 - steps, steps], axis=1)
    corners = rng.uniform(-most, most, (2, 2, 2))
    moved = np.einsum("ya,xb,abc->yxc", ends, ends, corners)
    moved += rng.uniform(-most / 2, most / 2, moved.shape)
    moved += np.stack(np.meshgrid(steps, steps), axis=-1)
    points = np.clip((left, top) + moved * (wide, tall), (0.0, 0.0), (float(width), float(height)))
    mesh = _mesh(points, width, height)
    return picture.transform(picture.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)


def _mesh(
    points: Float[np.ndarray, "y x 2"], width: int, height: int
) -> list[tuple[Window, tuple[float, ...]]]:
    """Cells of the result with the corners of what they show, as Pillow's MESH takes them."""
    columns, rows = (
        np.linspace(0, side, CELLS + 1).round().astype(int) for side in (width, height)
    )
    mesh = []
    for y in range(CELLS):
        for x in range(CELLS):
            cell = (int(columns[x]), int(rows[y]), int(columns[x + 1]), int(rows[y + 1]))
            shown = points[[y, y + 1, y + 1, y], [x, x, x + 1, x + 1]]
            mesh.append((cell, tuple(shown.ravel().tolist())))
    return mesh
