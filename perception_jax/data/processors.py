"""Host preprocessing of images: resize and crop exactly as the reference preprocessors do.

Five modes, all with Pillow's resampling on uint8, so that pixels equal the references' bit by bit:

- "hf_crop": shortest side to `resize`, centre crop, offset `(side - size) // 2`. Hugging Face's
  CLIP and DINOv2 processors; LLaVA's evaluation.
- "tv_crop": the same with offset `int(round((side - size) / 2))`, half to even. OpenAI's `clip`
  and open_clip; one pixel off "hf_crop" when `side - size` is 3 modulo 4.
- "squash": stretched to `size` × `size`. SigLIP, and open_clip's DFN.
- "llava_pad": centred on a square of `pad_colour`, then as "hf_crop". LLaVA-1.5; a letterbox.
- "whole": shortest side to `size`, the longest at most `longest`, nothing cut off; images keep
  their proportions, so they have many sizes.

Without `resizes` the crops cut out of the image as it is, and "whole" leaves it as it is.

The result is uint8; `ops.image.normalise` with the processor's `mean` and `std` follows on the
device. Letters: H W image.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from perception_jax import settings
from perception_jax.data import records
from perception_jax.data.geometry import Geometry
from perception_jax.data.images import MAX_PIXELS, decode_picture, read_picture
from perception_jax.data.resizing import RESAMPLE, Resample, exact_part
from perception_jax.errors import ConfigError, ImageError
from perception_jax.ops.image import CLIP_MEAN, CLIP_STD
from perception_jax.settings import FLAG, MEAN, STD, Choice

Mode = Literal["hf_crop", "tv_crop", "squash", "llava_pad", "whole"]
"""Preprocessing mode; see `ImageProcessor`."""
Alpha = Literal["white", "drop", "drop_resized"]
"""How transparency is handled."""

_MAX_RESIZED = 2**25
"""Pixels of a resized image above which only the part that the crop keeps is computed."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessedImage:
    """A processed image and the geometry to map back to the original.

    Attributes:
      pixels: uint8 RGB at the model's size; H = W but in mode "whole".
      geometry: from original pixels to `pixels`; maps boxes both ways and tells which are kept.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    geometry: Geometry


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageProcessor:
    """Resizes and crops or pads an image.

    Attributes:
      size: side of the result, pixels; in mode "whole" the shortest.
      mode: see the module.
      resize: what the shortest side is resized to before the crop; None for `size`.
      resizes: whether images are resized at all. A crop that is larger than the image is filled up
        with black.
      longest: in mode "whole", what the longest side is at most; None for no limit.
      multiple: in mode "whole", both sides are padded at the right and at the bottom to a multiple
        of it, with `pad_colour`.
      resample: the kernel, antialiased.
      mean, std: per channel in [0, 1], for `ops.image.normalise` on the device.
      pad_colour: RGB; by default what LLaVA pads with, the CLIP mean.
      exif: whether EXIF's orientation is applied; the code of CLIP, open_clip and timm does not.
      alpha: transparency is composited on "white" (transformers), dropped before resizing ("drop",
        as timm does) or after it ("drop_resized", as OpenAI's CLIP and open_clip do).

    Raises:
      ConfigError: a crop larger than the resized image, a field of another type or out of range, or
        one that the mode has no use for.
    """

    size: int
    mode: Mode = "hf_crop"
    resize: int | None = None
    resizes: bool = True
    longest: int | None = None
    multiple: int = 1
    resample: Resample = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pad_colour: tuple[int, int, int] = (122, 116, 104)
    exif: bool = True
    alpha: Alpha = "white"

    def __post_init__(self) -> None:
        settings.check_fields(self, _KINDS)
        if self.resize is not None and self.mode in ("squash", "whole"):
            raise ConfigError(f'mode "{self.mode}" has no crop: leave `resize` out.')
        if self.resize is not None and self.resize < self.size:
            raise ConfigError(
                f"the crop ({self.size}) is larger than the resized shortest side "
                f"({self.resize}): make `resize` at least `size`."
            )
        resized = self.mode in ("squash", "llava_pad") or self.resize or self.longest
        if resized and not self.resizes:
            raise ConfigError(
                f'mode "{self.mode}" resizes, and so do `resize` and `longest`: without `resizes` '
                'take "hf_crop", "tv_crop" or "whole", and leave them out.'
            )
        if (self.longest is not None or self.multiple != 1) and self.mode != "whole":
            raise ConfigError(f'mode "{self.mode}" has no use for `longest` and `multiple`.')
        if self.longest is not None and self.longest < self.size:
            raise ConfigError(
                f"longest: expected at least the shortest side, {self.size}, found {self.longest}."
            )

    @property
    def is_square(self) -> bool:
        """Whether every image becomes `size` × `size`."""
        return self.mode != "whole"

    def read(self, image: records.Image | PIL.Image.Image, *, name: str = "") -> ProcessedImage:
        """Decodes an image according to `exif` and `alpha`, and processes it.

        Args:
          image: as `data.images.decode` takes it.
          name: what to call it in an error.

        Raises:
          ImageError: it cannot be decoded, or as when called.
        """
        if self.alpha == "drop_resized" and self.mode in ("squash", "hf_crop", "tv_crop"):
            return self._process(read_picture(image, exif=self.exif, name=name))
        alpha = "white" if self.alpha == "white" else "drop"
        return self(decode_picture(image, exif=self.exif, alpha=alpha, name=name))

    def __call__(self, image: UInt8[np.ndarray, "H W 3"] | PIL.Image.Image) -> ProcessedImage:
        """Processes one decoded image, an array or an RGB picture of Pillow.

        Raises:
          ImageError: the result would not fit in memory: "llava_pad" or "whole" of an image that is
            very long.
        """
        return self._process(PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image)

    def geometry(self, width: int, height: int) -> Geometry:
        """Returns the map from pixels of an image of this size to those of the processed image.

        The same as `processor(image).geometry`, from the size alone: what a crop keeps of boxes is
        `processor.geometry(width, height).kept_share(boxes)`.

        Raises:
          ImageError: as when called.
        """
        steps = self._steps(width, height)
        return steps.padding.then(steps.resizing)

    def _process(self, picture: PIL.Image.Image) -> ProcessedImage:
        steps = self._steps(*picture.size)
        geometry = steps.padding.then(steps.resizing)
        if steps.padding.target != picture.size:
            left, top = (int(side) for side in steps.padding.offset)
            picture = _on_canvas(picture, (left, top), steps.padding.target, self.pad_colour)
        resample, canvas = RESAMPLE[self.resample], steps.resizing.target
        if self.is_square and self.resizes and steps.full[0] * steps.full[1] > _MAX_RESIZED:
            # A 1×N image would become enormous: compute only the part that the crop keeps, though
            # Pillow's rounding then differs in the last bit now and then.
            corners = np.array([[0, 0, *canvas]], np.float64)
            kept = steps.resizing.clip_source(steps.resizing.inverse_boxes(corners))
            return ProcessedImage(
                _pixels(picture.resize(canvas, resample, box=tuple(kept[0].tolist()))), geometry
            )
        if self.is_square and (
            kept := exact_part(picture.size, steps.full, steps.corner, canvas, self.resample)
        ):
            return ProcessedImage(_pixels(picture.resize(canvas, resample, box=kept)), geometry)
        if steps.full != picture.size:
            picture = picture.resize(steps.full, resample)
        if canvas != steps.full and not self.is_square:
            picture = _on_canvas(picture, (0, 0), canvas, self.pad_colour)
        elif canvas != steps.full:
            left, top = steps.corner
            picture = picture.crop((left, top, left + canvas[0], top + canvas[1]))
        return ProcessedImage(_pixels(picture), geometry)

    def _steps(self, width: int, height: int) -> _Steps:
        """Returns the steps for an image of this size.

        Raises:
          ImageError: the result would not fit in memory.
        """
        padding, square = Geometry.identity(width, height), (width, height)
        if self.mode == "llava_pad":
            square = (max(width, height),) * 2
            self._check_pixels((width, height), square)
            left, top = (
                (side - own) // 2 for side, own in zip(square, (width, height), strict=True)
            )
            padding = padding.cropped(-left, -top, *square)
        if self.mode == "squash":
            full = canvas = (self.size, self.size)
        elif self.mode == "whole":
            full = _shortest_side(*square, self.size, self.longest) if self.resizes else square
            canvas = tuple(-(-side // self.multiple) * self.multiple for side in full)
            self._check_pixels((width, height), canvas)
        else:
            full = _shortest_side(*square, self.resize or self.size) if self.resizes else square
            canvas = (self.size, self.size)
        corner = tuple(map(self._crop_offset, full)) if self.is_square else (0, 0)
        resizing = Geometry.resized(square, full).cropped(*corner, *canvas)
        return _Steps(padding, full, corner, resizing)

    def _check_pixels(self, source: tuple[int, int], target: tuple[int, int]) -> None:
        if target[0] * target[1] > MAX_PIXELS:
            way_out = "set `longest`" if self.mode == "whole" else "use another mode"
            raise ImageError(
                f"a {source[0]}×{source[1]} image would become {target[0]}×{target[1]} in mode "
                f'"{self.mode}", more than {MAX_PIXELS:,} pixels. Leave it out, shrink it, or '
                f"{way_out}."
            )

    def _crop_offset(self, side: int) -> int:
        if self.mode == "tv_crop" and side >= self.size:
            return round((side - self.size) / 2)
        if self.mode == "tv_crop":
            return -((self.size - side) // 2)
        return (side - self.size) // 2

    @staticmethod
    def from_hf(config: Mapping[str, Any], default: ImageProcessor | None = None) -> ImageProcessor:
        """Reads a Hugging Face `preprocessor_config.json` or `processor_config.json`.

        Reads what CLIP's, SigLIP's, DINOv2's (`BitImageProcessor`) and LLaVA's processors write.

        Args:
          default: its size is the model's, for files that neither resize nor crop.

        Raises:
          ConfigError: a setting that this class cannot reproduce.
        """
        from perception_jax.data import processor_formats

        return processor_formats.from_hf(config, default)

    def to_hf(self, *, ours: bool = False) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` that makes `transformers` do the same.

        For "tv_crop" `transformers` has no exact counterpart: it will crop as "hf_crop" does, at
        most one pixel off. The mode is noted under an extra key, so `from_hf` restores it, and so
        are `exif` and `alpha`, which depend on how `transformers` is called.

        Args:
          ours: whether the file is for `from_hf` alone, which reads keys that transformers ignores.

        Raises:
          ConfigError: a padding that Hugging Face would not do.
        """
        from perception_jax.data import processor_formats

        return processor_formats.to_hf(self, ours=ours)


@dataclasses.dataclass(frozen=True, slots=True)
class _Steps:
    """Padding to a square, resizing, and cutting or padding at the edges, for one size of image.

    Attributes:
      padding: from the image to the square; the identity in modes that do not pad first.
      full: width and height after resizing.
      corner: left and top of the result in the resized image; negative where it is padded.
      resizing: from the padded image to the result.
    """

    padding: Geometry
    full: tuple[int, int]
    corner: tuple[int, int]
    resizing: Geometry


def _on_canvas(
    picture: PIL.Image.Image,
    corner: tuple[int, int],
    size: tuple[int, int],
    colour: tuple[int, int, int],
) -> PIL.Image.Image:
    canvas = PIL.Image.new("RGB", size, colour)
    canvas.paste(picture, corner)
    return canvas


def _pixels(picture: PIL.Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _shortest_side(
    width: int, height: int, side: int, longest: int | None = None
) -> tuple[int, int]:
    """The size whose shortest side is `side`; the longest is rounded down, and at most `longest`,
    as in DETR: then the shortest is rounded to the nearest."""
    short, long = sorted((width, height))
    if longest is not None and long / short * side > longest:
        exact = longest * short / long
        sides = max(1, round(exact)), int(exact * long / short)
        return sides if width <= height else (sides[1], sides[0])
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


ALPHA = Choice(typing.get_args(Alpha))
"""Setting type of `ImageProcessor.alpha`."""
_SIDE = settings.IMAGE_SIZE
_COLOUR = settings.Several(settings.Integer(0, 255), 3, 3)
_KINDS = {
    "size": _SIDE,
    "mode": Choice(typing.get_args(Mode)),
    "resize": settings.Optional(_SIDE),
    "resizes": FLAG,
    "longest": settings.Optional(_SIDE),
    "multiple": _SIDE,
    "exif": FLAG,
    "alpha": ALPHA,
    "resample": Choice(typing.get_args(Resample)),
    "mean": MEAN,
    "std": STD,
    "pad_colour": _COLOUR,
}
