"""Host preprocessing of images: resize and crop exactly as the reference preprocessors do.

Four modes, all with Pillow's resampling on uint8, so that pixels equal the references' bit by bit:

- "hf_crop": shortest side to `resize`, centre crop, offset `(side - size) // 2`. Hugging Face's
  CLIP and DINOv2 processors; LLaVA's evaluation.
- "tv_crop": the same with offset `int(round((side - size) / 2))`, half to even. OpenAI's `clip`
  and open_clip; one pixel off "hf_crop" when `side - size` is 3 modulo 4.
- "squash": stretched to `size` × `size`. SigLIP, and open_clip's DFN.
- "llava_pad": centred on a square of `pad_colour`, then as "hf_crop". LLaVA-1.5; a letterbox.

The result is uint8; `ops.image.normalise` with the processor's `mean` and `std` follows on the
device. Letters: H W image, S the model's side.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from perception_jax import settings
from perception_jax.data.geometry import Geometry
from perception_jax.data.images import MAX_PIXELS
from perception_jax.errors import ConfigError, ImageError
from perception_jax.ops.image import CLIP_MEAN, CLIP_STD
from perception_jax.settings import FLAG, MEAN, STD, Choice, Settings

Mode = Literal["hf_crop", "tv_crop", "squash", "llava_pad"]
Resample = Literal["bicubic", "bilinear"]

_MAX_RESIZED = 2**25
"""Pixels of a resized image above which only the part that the crop keeps is computed."""

_OUR_MODE = "perception_jax_mode"
"""Key of a `preprocessor_config.json` for what Hugging Face's own keys cannot say."""

_RESAMPLE = {
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "bilinear": PIL.Image.Resampling.BILINEAR,
}


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessedImage:
    """What the model sees, and how to find the way back.

    Attributes:
      pixels: uint8 RGB at the model's size.
      geometry: from original pixels to `pixels`; maps boxes both ways and tells which are kept.
    """

    pixels: UInt8[np.ndarray, "S S 3"]
    geometry: Geometry


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageProcessor:
    """Resize, crop or pad to a square.

    Attributes:
      size: side of the result, pixels.
      mode: see the module.
      resize: what the shortest side is resized to before the crop; None for `size`.
      resample: the kernel, antialiased.
      mean, std: per channel in [0, 1], for `ops.image.normalise` on the device.
      pad_colour: of "llava_pad", RGB; by default what LLaVA pads with, the CLIP mean.

    Raises:
      ConfigError: a crop larger than the resized image, or a field of another type or out of range.
    """

    size: int
    mode: Mode = "hf_crop"
    resize: int | None = None
    resample: Resample = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    pad_colour: tuple[int, int, int] = (122, 116, 104)

    def __post_init__(self) -> None:
        settings.check_fields(self, _KINDS)
        if self.resize is not None and self.mode == "squash":
            raise ConfigError('mode "squash" has no crop: leave `resize` out.')
        if self.resize is not None and self.resize < self.size:
            raise ConfigError(
                f"the crop ({self.size}) is larger than the resized shortest side "
                f"({self.resize}): make `resize` at least `size`."
            )

    def __call__(self, image: UInt8[np.ndarray, "H W 3"]) -> ProcessedImage:
        """Processes one decoded image.

        Raises:
          ImageError: "llava_pad" of an image so long that its square would not fit in memory.
        """
        height, width = image.shape[:2]
        picture = PIL.Image.fromarray(image)
        if self.mode == "squash":
            target = (self.size, self.size)
            pixels = np.array(picture.resize(target, _RESAMPLE[self.resample]))
            return ProcessedImage(pixels, Geometry.resized((width, height), target))
        padded = Geometry.identity(width, height)
        if self.mode == "llava_pad":
            picture, padded = self._pad(picture)
        pixels, cropped = self._resize_and_crop(picture)
        return ProcessedImage(pixels, padded.then(cropped))

    def _pad(self, picture: PIL.Image.Image) -> tuple[PIL.Image.Image, Geometry]:
        width, height = picture.size
        side = max(width, height)
        if side * side > MAX_PIXELS:
            raise ImageError(
                f"a {width}×{height} image padded to {side}×{side} exceeds {MAX_PIXELS:,} pixels. "
                'Leave it out, shrink it, or use another mode than "llava_pad".'
            )
        left, top = (side - width) // 2, (side - height) // 2
        square = PIL.Image.new("RGB", (side, side), self.pad_colour)
        square.paste(picture, (left, top))
        return square, Geometry.identity(width, height).cropped(-left, -top, side, side)

    def _resize_and_crop(self, picture: PIL.Image.Image) -> tuple[np.ndarray, Geometry]:
        width, height = picture.size
        full = _shortest_side(width, height, self.resize or self.size)
        left, top = (self._crop_offset(side) for side in full)
        geometry = Geometry.resized((width, height), full)
        geometry = geometry.cropped(left, top, self.size, self.size)
        resample = _RESAMPLE[self.resample]
        if full[0] * full[1] > _MAX_RESIZED:
            # A 1×N image would become enormous: compute only the part that the crop keeps. (Not
            # done always, since Pillow's rounding then differs in the last bit now and then.)
            corners = np.array([[0, 0, self.size, self.size]], np.float64)
            kept = tuple(geometry.clip_source(geometry.inverse_boxes(corners))[0].tolist())
            return np.array(picture.resize((self.size, self.size), resample, box=kept)), geometry
        # Exactly the resized size, so that Pillow returns the same picture unresampled.
        resized = picture.resize(full, resample)
        kept = (left, top, left + self.size, top + self.size)
        return np.array(resized.crop(kept)), geometry

    def _crop_offset(self, side: int) -> int:
        if self.mode == "tv_crop":
            return round((side - self.size) / 2)
        return (side - self.size) // 2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ImageProcessor:
        """From the content of a Hugging Face `preprocessor_config.json`.

        Reads what CLIP's, SigLIP's, DINOv2's (`BitImageProcessor`) and LLaVA's processors write.

        Raises:
          ConfigError: a setting that this class cannot reproduce.
        """
        file = Settings(config, "preprocessor config")
        file = file.section("image_processor") if "image_processor" in file else file
        for key in ("do_resize", "do_rescale"):
            if not file.get(key, FLAG, True):
                raise ConfigError(f"preprocessor config: {key} = false is not supported.")
        factor = file.get("rescale_factor", settings.FACTOR, 1 / 255)
        if abs(factor - 1 / 255) > 1e-6:
            raise ConfigError(
                f"preprocessor config: expected rescale_factor 1/255, found {factor}."
            )
        kernels = {int(kernel): name for name, kernel in _RESAMPLE.items()}
        number = file.get("resample", settings.Integer(0, 5), 3)
        if number not in kernels:
            raise ConfigError(
                "preprocessor config: expected resample 3 (bicubic) or 2 (bilinear), found "
                f"{number}."
            )
        normalised = file.get("do_normalize", FLAG, True)
        common = {
            "resample": kernels[number],
            "mean": file.get("image_mean", MEAN) if normalised else (0.0, 0.0, 0.0),
            "std": file.get("image_std", STD) if normalised else (1.0, 1.0, 1.0),
        }
        return cls(**_hf_mode(file), **common)

    def to_hf(self) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` that makes `transformers` do the same.

        For "tv_crop" `transformers` has no exact counterpart: it will crop as "hf_crop" does, at
        most one pixel off. The mode is noted under a key of ours, so `from_hf` restores it.

        Raises:
          ConfigError: a padding colour that Hugging Face would not use.
        """
        common = {
            "do_convert_rgb": True,
            "do_resize": True,
            "resample": int(_RESAMPLE[self.resample]),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        square = {"height": self.size, "width": self.size}
        if self.mode == "squash":
            return {"image_processor_type": "SiglipImageProcessor", "size": square, **common}
        crop = {
            "size": {"shortest_edge": self.resize or self.size},
            "do_center_crop": True,
            "crop_size": square,
        }
        if self.mode == "llava_pad":
            if self.pad_colour != _mean_colour(self.mean):
                raise ConfigError(
                    f"Hugging Face pads with the mean colour {_mean_colour(self.mean)}, this "
                    f"processor with {self.pad_colour}: use the mean colour to export."
                )
            kind = "LlavaImageProcessor"
            return {"image_processor_type": kind, "do_pad": True, **crop, **common}
        exact = {_OUR_MODE: self.mode} if self.mode == "tv_crop" else {}
        return {"image_processor_type": "CLIPImageProcessor", **crop, **common, **exact}


def _shortest_side(width: int, height: int, side: int) -> tuple[int, int]:
    """The size whose shortest side is `side`; the longest is rounded down."""
    if width <= height:
        return side, int(side * height / width)
    return int(side * width / height), side


_SIDE = settings.IMAGE_SIZE
_COLOUR = settings.Several(settings.Integer(0, 255), 3, 3)
_KINDS = {
    "size": _SIDE,
    "mode": Choice(typing.get_args(Mode)),
    "resize": settings.Optional(_SIDE),
    "resample": Choice(typing.get_args(Resample)),
    "mean": MEAN,
    "std": STD,
    "pad_colour": _COLOUR,
}


def _hf_mode(file: Settings) -> dict[str, Any]:
    crops = file.get("do_center_crop", FLAG, "crop_size" in file)
    size = _size(file, "size")
    if not isinstance(size, int) and "shortest_edge" not in size:
        side = _square_side(size)
        if not crops:
            return {"mode": "squash", "size": side}
        raise ConfigError(
            f"preprocessor config: expected size.shortest_edge with do_center_crop, found "
            f"{settings.shown(size.content)}."
        )
    shortest = size if isinstance(size, int) else size.get("shortest_edge", _SIDE)
    if not crops:
        if not isinstance(size, int):
            raise ConfigError(
                "preprocessor config: size.shortest_edge without do_center_crop gives images of "
                "many sizes, which is not supported."
            )
        return {"mode": "squash", "size": size}
    crop = _size(file, "crop_size") if "crop_size" in file else shortest
    side = crop if isinstance(crop, int) else _square_side(crop)
    resize = None if shortest == side else shortest
    if not file.get("do_pad", FLAG, False):
        mode = file.get(_OUR_MODE, Choice(("hf_crop", "tv_crop")), "hf_crop")
        return {"mode": mode, "size": side, "resize": resize}
    colour = _mean_colour(file.get("image_mean", MEAN))
    return {"mode": "llava_pad", "size": side, "resize": resize, "pad_colour": colour}


def _size(file: Settings, key: str) -> int | Settings:
    """A size as a number, or as an object that names sides."""
    named = isinstance(file.content.get(key), Mapping)
    return file.section(key) if named else file.get(key, _SIDE)


def _mean_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    return tuple(int(channel * 255) for channel in mean)


def _square_side(size: Settings) -> int:
    height, width = size.get("height", _SIDE, None), size.get("width", _SIDE, None)
    if height is None or height != width:
        found = settings.shown(size.content)
        raise ConfigError(f"preprocessor config: expected a square size, found {found}.")
    return height
