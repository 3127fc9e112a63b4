"""`ImageProcessor` in the words of open_clip and timm; Hugging Face's are in `data.processors`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError

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
    mode = settings.get("resize_mode", "shortest")
    if mode not in _OPEN_CLIP_MODES:
        raise ConfigError(
            f"open_clip's preprocess_cfg: expected resize_mode {' or '.join(_OPEN_CLIP_MODES)}, "
            f"found {mode!r}."
        )
    return ImageProcessor(
        size=default.size,
        mode=_OPEN_CLIP_MODES[mode],
        resample=_kernel("open_clip", settings),
        mean=tuple(settings.get("mean", default.mean)),
        std=tuple(settings.get("std", default.std)),
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
    size = (settings.get("input_size") or [default.size])[-1]
    resize = math.floor(size / (settings.get("crop_pct") or 0.875))
    mode = settings.get("crop_mode") or "center"
    if mode not in ("center", "squash") or (mode == "squash" and resize != size):
        raise ConfigError(
            "timm's pretrained_cfg: expected crop_mode 'center', or 'squash' with crop_pct 1, "
            f"found {mode!r} with {settings.get('crop_pct')}."
        )
    return ImageProcessor(
        size=size,
        mode="squash" if mode == "squash" else "tv_crop",
        resize=None if resize == size else resize,
        resample=_kernel("timm", settings),
        mean=tuple(settings.get("mean", default.mean)),
        std=tuple(settings.get("std", default.std)),
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


def _kernel(name: str, settings: Mapping[str, Any]) -> str:
    kernel = settings.get("interpolation") or "bicubic"
    if kernel not in ("bicubic", "bilinear"):
        raise ConfigError(
            f"{name}'s preprocessing: expected interpolation bicubic or bilinear, found {kernel!r}."
        )
    return kernel
