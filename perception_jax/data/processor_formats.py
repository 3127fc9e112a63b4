"""Conversion of `ImageProcessor` from and to open_clip's and timm's settings (Hugging Face:
`processor_hf`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from perception_jax.data import processor_hf
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError
from perception_jax.settings import (
    IMAGE_SIZE,
    MEAN,
    STD,
    Choice,
    Number,
    Optional,
    Settings,
    Several,
)

_SIDES = Optional(Several(IMAGE_SIZE, 1, 3))
_SHARE = Number(above=0.01, high=1.0)
"""Share of the resized image that the crop keeps."""
_OPEN_CLIP_MODES = {"shortest": "tv_crop", "squash": "squash"}


def with_decoding(layout: ImageProcessor, settings: Mapping[str, Any]) -> ImageProcessor:
    """A layout's processor with the decoding that our own note in its settings names, if any."""
    noted = processor_hf.read_decode(Settings(settings, "image processor"), layout)
    return dataclasses.replace(layout, **noted)


def from_open_clip(settings: Mapping[str, Any], default: ImageProcessor) -> ImageProcessor:
    """Reads the `preprocess_cfg` of an `open_clip_config.json`.

    Args:
      settings: keys that are left out take open_clip's defaults.
      default: its size is the model's, which open_clip takes from the model too; mean and
        standard deviation where the settings name none; decoding.

    Raises:
      ConfigError: a setting that `ImageProcessor` cannot reproduce.
    """
    file = Settings(settings, "open_clip's preprocess_cfg")
    return ImageProcessor(
        size=default.size,
        mode=_OPEN_CLIP_MODES[file.get("resize_mode", Choice((*_OPEN_CLIP_MODES,)), "shortest")],
        resample=_kernel(file),
        mean=file.get("mean", MEAN, default.mean),
        std=file.get("std", STD, default.std),
        exif=default.exif,
        alpha=default.alpha,
    )


def to_open_clip(processor: ImageProcessor) -> dict[str, Any]:
    """The inverse of `from_open_clip`; "hf_crop" becomes "tv_crop", at most one pixel off.

    Raises:
      ConfigError: padding, a crop out of a larger image or another mode that open_clip does not
        have.
    """
    crops = processor.resizes and processor.mode in ("hf_crop", "tv_crop", "squash")
    if not crops or processor.resize not in (None, processor.size):
        raise ConfigError(
            "open_clip resizes to the model's own size, without padding; found "
            f"{processor}. Export in another layout."
        )
    return {
        "mean": list(processor.mean),
        "std": list(processor.std),
        "interpolation": processor.resample,
        "resize_mode": "squash" if processor.mode == "squash" else "shortest",
    }


def from_timm(settings: Mapping[str, Any], default: ImageProcessor) -> ImageProcessor:
    """Reads the `pretrained_cfg` of timm's `config.json`.

    Args:
      settings: keys that are left out take timm's defaults.
      default: size, mean and standard deviation where the settings name none; decoding.

    Raises:
      ConfigError: a setting that `ImageProcessor` cannot reproduce.
    """
    file = Settings(settings, "timm's pretrained_cfg")
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
    return ImageProcessor(
        size=size,
        mode="squash" if mode == "squash" else "tv_crop",
        resize=None if resize == size else resize,
        resample=_kernel(file),
        mean=file.get("mean", MEAN, default.mean),
        std=file.get("std", STD, default.std),
        exif=default.exif,
        alpha=default.alpha,
    )


def to_timm(processor: ImageProcessor) -> dict[str, Any]:
    """The inverse of `from_timm`, without the size, which timm takes from the model.

    Raises:
      ConfigError: padding, images of their own size or proportions, which timm does not have.
    """
    if not processor.resizes or processor.mode not in ("hf_crop", "tv_crop", "squash"):
        raise ConfigError(
            "timm's preprocessing resizes and crops to a square, without padding; found "
            f"{processor}. Export in another layout."
        )
    resize = processor.resize or processor.size
    exact = processor.size / resize
    # timm rounds down size / crop_pct.
    rounded_down = math.floor(processor.size / exact) < resize
    return {
        "mean": list(processor.mean),
        "std": list(processor.std),
        "interpolation": processor.resample,
        "crop_pct": processor.size / (resize + 0.5) if rounded_down else exact,
        "crop_mode": "squash" if processor.mode == "squash" else "center",
    }


def _kernel(file: Settings) -> str:
    kernel = file.get("interpolation", Optional(Choice(("bicubic", "bilinear"))), None)
    return kernel or "bicubic"
