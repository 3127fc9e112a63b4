"""Conversion of `ImageProcessor` from and to the settings of Hugging Face, open_clip and timm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from perception_jax import settings
from perception_jax.data.processors import ALPHA, ImageProcessor
from perception_jax.errors import ConfigError
from perception_jax.settings import FLAG, MEAN, STD, Choice, Number, Optional, Settings, Several

_OUR_MODE = "perception_jax_mode"
"""Key of a `preprocessor_config.json` for what Hugging Face's own keys cannot express."""
_DECODE = "perception_jax_decode"
"""Key of a settings file for the decoding, where it differs from that of the layout's code."""
_OTHER_STEPS = (
    "do_flip_channel_order", "do_grayscale", "do_thumbnail", "do_align_long_axis", "crop_pct",
)  # fmt: skip
"""Settings of Hugging Face's processors of other models; each changes pixels."""
_HF_RESAMPLE = {"bicubic": 3, "bilinear": 2}
_OPEN_CLIP_MODES = {"shortest": "tv_crop", "squash": "squash"}
_SIDE = settings.IMAGE_SIZE
_LONGEST = Optional(_SIDE)
_SIDES = Optional(Several(_SIDE, 1, 3))
_SHARE = Number(above=0.01, high=1.0)
"""Share of the resized image that the crop keeps."""


# --- Decoding, in all layouts ---------------------------------------------------------------------


def with_decoding(layout: ImageProcessor, content: Mapping[str, Any]) -> ImageProcessor:
    """A layout's processor with the decoding that our own note in its settings names, if any."""
    noted = _read_decoding(Settings(content, "image processor"), layout.exif, layout.alpha)
    return dataclasses.replace(layout, **noted)


def decoding_note(image: ImageProcessor, layout: ImageProcessor | None = None) -> dict[str, Any]:
    """The inverse of `with_decoding`: empty if images are decoded as by the layout's processor, or
    as Hugging Face does without one."""
    usual = (True, "white") if layout is None else (layout.exif, layout.alpha)
    if (image.exif, image.alpha) == usual:
        return {}
    return {_DECODE: {"exif": image.exif, "alpha": image.alpha}}


def _read_decoding(file: Settings, exif: bool = True, alpha: str = "white") -> dict[str, Any]:
    noted = file.section(_DECODE, optional=True)
    return {"exif": noted.get("exif", FLAG, exif), "alpha": noted.get("alpha", ALPHA, alpha)}


# --- Hugging Face ---------------------------------------------------------------------------------


def from_hf(content: Mapping[str, Any], default: ImageProcessor | None = None) -> ImageProcessor:
    """Reads a `preprocessor_config.json`; see `ImageProcessor.from_hf`."""
    file = Settings(content, "preprocessor config")
    file = file.section("image_processor") if "image_processor" in file else file
    if not file.get("do_rescale", FLAG, True):
        raise ConfigError("preprocessor config: do_rescale = false is not supported.")
    for name in _OTHER_STEPS:
        if file.content.get(name) not in (None, False):
            value = settings.shown(file.content[name])
            raise ConfigError(f"preprocessor config: {name} = {value} is not supported.")
    factor = file.get("rescale_factor", settings.FACTOR, 1 / 255)
    if abs(factor - 1 / 255) > 1e-6:
        raise ConfigError(f"preprocessor config: expected rescale_factor 1/255, found {factor}.")
    kernels = {number: name for name, number in _HF_RESAMPLE.items()}
    number = file.get("resample", settings.Integer(0, 5), 3)
    if number not in kernels:
        raise ConfigError(
            f"preprocessor config: expected resample 3 (bicubic) or 2 (bilinear), found {number}."
        )
    normalised = file.get("do_normalize", FLAG, True)
    return ImageProcessor(
        resample=kernels[number],
        mean=file.get("image_mean", MEAN) if normalised else (0.0, 0.0, 0.0),
        std=file.get("image_std", STD) if normalised else (1.0, 1.0, 1.0),
        **_hf_mode(file, None if default is None else default.size),
        **_read_decoding(file),
    )


def to_hf(image: ImageProcessor, *, ours: bool = False) -> dict[str, Any]:
    """The inverse of `from_hf`; see `ImageProcessor.to_hf`."""
    common = {
        "do_convert_rgb": True,
        "do_resize": image.resizes,
        "resample": _HF_RESAMPLE[image.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        **decoding_note(image),
    }
    square = {"height": image.size, "width": image.size}
    if image.mode == "squash":
        return {"image_processor_type": "SiglipImageProcessor", "size": square, **common}
    common["image_processor_type"] = "CLIPImageProcessor"
    if image.mode == "whole":
        return common | _whole_to_hf(image, ours)
    crop = {
        "size": {"shortest_edge": image.resize or image.size},
        "do_center_crop": True,
        "crop_size": square,
    }
    if image.mode == "llava_pad":
        _check_pad_colour(image)
        kind = "LlavaImageProcessor"
        return common | crop | {"image_processor_type": kind, "do_pad": True}
    exact = {_OUR_MODE: image.mode} if image.mode == "tv_crop" else {}
    return common | crop | exact


def _whole_to_hf(image: ImageProcessor, ours: bool) -> dict[str, Any]:
    limit = {} if image.longest is None else {"longest_edge": image.longest}
    whole = {"size": {"shortest_edge": image.size} | limit, "do_center_crop": False}
    if image.multiple == 1:
        return whole
    if not ours:
        raise ConfigError(
            "Hugging Face's processors of these models pad to no multiple, found "
            f"{image.multiple}: export in the 'jax' layout, or with `multiple` 1."
        )
    _check_pad_colour(image)
    return whole | {"do_pad": True, "size_divisor": image.multiple}


def _check_pad_colour(image: ImageProcessor) -> None:
    if image.pad_colour != _colour(image.mean):
        raise ConfigError(
            f"Hugging Face pads with the mean colour {_colour(image.mean)}, this "
            f"processor with {image.pad_colour}: use the mean colour to export."
        )


def _hf_mode(file: Settings, size_of_model: int | None) -> dict[str, Any]:
    """The fields of an `ImageProcessor` for resizing, cropping and padding."""
    crops = file.get("do_center_crop", FLAG, "crop_size" in file)
    pads = file.get("do_pad", Optional(FLAG), False) or False
    if not pads and file.content.get("size_divisor") is not None:
        raise ConfigError("preprocessor config: size_divisor without do_pad is not supported.")
    if not file.get("do_resize", FLAG, True):
        return _unresized(file, size_of_model, crops) | _multiple(file, pads)
    size = _size(file, "size")
    named = not isinstance(size, int) and "shortest_edge" in size
    if not named and not (isinstance(size, int) and crops):
        side = _square_side(size)
        if not crops:
            return {"mode": "squash", "size": side} | _multiple(file, pads)
        raise ConfigError(
            f"preprocessor config: expected size.shortest_edge with do_center_crop, found "
            f"{settings.shown(size.content)}."
        )
    shortest = size.get("shortest_edge", _SIDE) if named else size
    longest = size.get("longest_edge", _LONGEST, None) if named else None
    if not crops:
        return {"mode": "whole", "size": shortest, "longest": longest} | _multiple(file, pads)
    if longest is not None:
        raise ConfigError(
            "preprocessor config: size.longest_edge together with do_center_crop is not supported."
        )
    side = _square_side(_size(file, "crop_size")) if "crop_size" in file else shortest
    crop = {"size": side, "resize": None if shortest == side else shortest}
    if not pads:
        return crop | {"mode": _crop(file)}
    return crop | {"mode": "llava_pad", "pad_colour": _colour(file.get("image_mean", MEAN))}


def _crop(file: Settings) -> str:
    return file.get(_OUR_MODE, Choice(("hf_crop", "tv_crop")), "hf_crop")


def _unresized(file: Settings, size_of_model: int | None, crops: bool) -> dict[str, Any]:
    if crops:
        side = _square_side(_size(file, "crop_size"))
        return {"mode": _crop(file), "size": side, "resizes": False}
    if size_of_model is None and "size" in file:
        size = _size(file, "size")
        named = not isinstance(size, int) and "shortest_edge" in size
        size_of_model = size.get("shortest_edge", _SIDE) if named else _square_side(size)
    if size_of_model is None:
        raise ConfigError(
            "preprocessor config: expected the model's image size for settings that neither resize "
            "nor crop, found none."
        )
    return {"mode": "whole", "size": size_of_model, "resizes": False}


def _multiple(file: Settings, pads: bool) -> dict[str, Any]:
    """The padding where nothing is cropped."""
    if not pads:
        return {}
    multiple = file.get("size_divisor", Optional(_SIDE), None)
    if multiple is None:
        raise ConfigError(
            "preprocessor config: do_pad without do_center_crop needs size_divisor, the multiple "
            "to which both sides are padded; padding to the largest of a batch is not supported."
        )
    return {"multiple": multiple, "pad_colour": _colour(file.get("image_mean", MEAN))}


def _size(file: Settings, key: str) -> int | Settings:
    """A size as a number, or as an object that names sides."""
    named = isinstance(file.content.get(key), Mapping)
    return file.section(key) if named else file.get(key, _SIDE)


def _square_side(size: int | Settings) -> int:
    if isinstance(size, int):
        return size
    height, width = size.get("height", _SIDE, None), size.get("width", _SIDE, None)
    if height is None or height != width:
        found = settings.shown(size.content)
        raise ConfigError(f"preprocessor config: expected a square size, found {found}.")
    return height


def _colour(mean: Sequence[float]) -> tuple[int, int, int]:
    return tuple(int(channel * 255) for channel in mean)


# --- open_clip and timm ---------------------------------------------------------------------------


def from_open_clip(content: Mapping[str, Any], default: ImageProcessor) -> ImageProcessor:
    """Reads the `preprocess_cfg` of an `open_clip_config.json`.

    Args:
      content: keys that are left out take open_clip's defaults.
      default: its size is the model's, which open_clip takes from the model too; mean and
        standard deviation where the settings name none; decoding.

    Raises:
      ConfigError: a setting that `ImageProcessor` cannot reproduce.
    """
    file = Settings(content, "open_clip's preprocess_cfg")
    mode = file.get("resize_mode", Choice((*_OPEN_CLIP_MODES,)), "shortest")
    return _read_common(file, default, size=default.size, mode=_OPEN_CLIP_MODES[mode])


def to_open_clip(image: ImageProcessor) -> dict[str, Any]:
    """The inverse of `from_open_clip`; "hf_crop" becomes "tv_crop", at most one pixel off.

    Raises:
      ConfigError: padding, a crop out of a larger image or another mode that open_clip does not
        have.
    """
    if not _crops_to_square(image) or image.resize not in (None, image.size):
        raise ConfigError(
            "open_clip resizes to the model's own size, without padding; found "
            f"{image}. Export in another layout."
        )
    mode = "squash" if image.mode == "squash" else "shortest"
    return {**_write_common(image), "resize_mode": mode}


def from_timm(content: Mapping[str, Any], default: ImageProcessor) -> ImageProcessor:
    """Reads the `pretrained_cfg` of timm's `config.json`.

    Args:
      content: keys that are left out take timm's defaults.
      default: size, mean and standard deviation where the settings name none; decoding.

    Raises:
      ConfigError: a setting that `ImageProcessor` cannot reproduce.
    """
    file = Settings(content, "timm's pretrained_cfg")
    sides = (file.get("input_size", _SIDES, None) or (default.size,))[-2:]
    if len(set(sides)) != 1:
        raise ConfigError(f"timm's pretrained_cfg: expected a square input_size, found {sides}.")
    size = sides[0]
    share = file.get("crop_pct", Optional(_SHARE), None) or 0.875
    resize = math.floor(size / share)
    mode = file.get("crop_mode", Optional(Choice(("center", "squash"))), None) or "center"
    if mode == "squash" and resize != size:
        raise ConfigError(
            "timm's pretrained_cfg: expected crop_mode 'center', or 'squash' with crop_pct 1, "
            f"found {mode!r} with {share}."
        )
    return _read_common(
        file,
        default,
        size=size,
        mode="squash" if mode == "squash" else "tv_crop",
        resize=None if resize == size else resize,
    )


def to_timm(image: ImageProcessor) -> dict[str, Any]:
    """The inverse of `from_timm`, without the size, which timm takes from the model.

    Raises:
      ConfigError: padding, images of their own size or proportions, which timm does not have.
    """
    if not _crops_to_square(image):
        raise ConfigError(
            "timm's preprocessing resizes and crops to a square, without padding; found "
            f"{image}. Export in another layout."
        )
    resize = image.resize or image.size
    exact = image.size / resize
    # timm rounds down size / crop_pct.
    rounded_down = math.floor(image.size / exact) < resize
    return {
        **_write_common(image),
        "crop_pct": image.size / (resize + 0.5) if rounded_down else exact,
        "crop_mode": "squash" if image.mode == "squash" else "center",
    }


def _crops_to_square(image: ImageProcessor) -> bool:
    return image.resizes and image.mode in ("hf_crop", "tv_crop", "squash")


def _read_common(file: Settings, default: ImageProcessor, **fields: Any) -> ImageProcessor:
    kernel = file.get("interpolation", Optional(Choice(("bicubic", "bilinear"))), None)
    return ImageProcessor(
        resample=kernel or "bicubic",
        mean=file.get("mean", MEAN, default.mean),
        std=file.get("std", STD, default.std),
        exif=default.exif,
        alpha=default.alpha,
        **fields,
    )


def _write_common(image: ImageProcessor) -> dict[str, Any]:
    return {
        "mean": list(image.mean),
        "std": list(image.std),
        "interpolation": image.resample,
    }
