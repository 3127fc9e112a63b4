"""`ImageProcessor` in the words of open_clip and timm; Hugging Face's are in `data.processors`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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
"""Of the resized image that the crop keeps."""
_OPEN_CLIP_MODES = {"shortest": "tv_crop", "squash": "squash"}


def from_open_clip(settings: Mapping[str, Any], default: ImageProcessor) -> ImageProcessor:
    """From the `preprocess_cfg` of an `open_clip_config.json`.

    Args:
      settings: keys that are left out take open_clip's defaults.
      default: its size is the model's, which open_clip takes from the model too; mean and
        standard deviation where the settings name none.

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
    )


def to_open_clip(processor: ImageProcessor) -> dict[str, Any]:
    """The inverse of `from_open_clip`; "hf_crop" becomes "tv_crop", at most one pixel off.

    Raises:
      ConfigError: padding, or a crop out of a larger image, which open_clip does not have.
    """
    if processor.mode == "llava_pad" or processor.resize not in (None, processor.size):
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
    """From the `pretrained_cfg` of timm's `config.json`.

    Args:
      settings: keys that are left out take timm's defaults.
      default: size, mean and standard deviation where the settings name none.

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
    )


def to_timm(processor: ImageProcessor) -> dict[str, Any]:
    """The inverse of `from_timm`, but for the size, which timm takes from the model.

    Raises:
      ConfigError: padding, which timm does not have.
    """
    if processor.mode == "llava_pad":
        raise ConfigError("timm's preprocessing has no padding: export in another layout.")
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
