"""Conversion of `ImageProcessor` from and to Hugging Face's settings, with extra keys if needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.settings import FLAG, MEAN, STD, Choice, Settings

Alpha = Literal["white", "drop", "drop_resized"]
"""How transparency is handled."""

_OUR_MODE = "perception_jax_mode"
"""Key of a `preprocessor_config.json` for what Hugging Face's own keys cannot express."""
DECODE_KEY = "perception_jax_decode"
"""Key of a settings file for the decoding, where it differs from that of the layout's code."""
_OTHER_STEPS = (
    "do_flip_channel_order", "do_grayscale", "do_thumbnail", "do_align_long_axis", "crop_pct",
)  # fmt: skip
"""Settings of processors of other models; each changes pixels."""
_RESAMPLE = {"bicubic": 3, "bilinear": 2}
_SIDE = settings.IMAGE_SIZE
_LONGEST = settings.Optional(_SIDE)
_ALPHA = Choice(("white", "drop", "drop_resized"))


@runtime_checkable
class Decoded(Protocol):
    """Decoding options: `exif` and `alpha` of an `ImageProcessor`."""

    @property
    def exif(self) -> bool:
        """Whether EXIF's orientation is applied."""

    @property
    def alpha(self) -> str:
        """How transparency is handled."""


@dataclasses.dataclass(frozen=True)
class _Decoded:
    exif: bool = True
    alpha: Alpha = "white"


_HF = _Decoded()


def read(config: Mapping[str, Any], size: int | None) -> dict[str, Any]:
    """Fields of an `ImageProcessor`; see `ImageProcessor.from_hf`.

    Args:
      size: of the model's images, for files that neither resize nor crop.
    """
    file = Settings(config, "preprocessor config")
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
    kernels = {number: name for name, number in _RESAMPLE.items()}
    number = file.get("resample", settings.Integer(0, 5), 3)
    if number not in kernels:
        raise ConfigError(
            f"preprocessor config: expected resample 3 (bicubic) or 2 (bilinear), found {number}."
        )
    normalised = file.get("do_normalize", FLAG, True)
    common = {
        "resample": kernels[number],
        "mean": file.get("image_mean", MEAN) if normalised else (0.0, 0.0, 0.0),
        "std": file.get("image_std", STD) if normalised else (1.0, 1.0, 1.0),
    }
    return {**_mode(file, size), **common, **read_decode(file)}


def write(image: Any, *, ours: bool) -> dict[str, Any]:
    """The inverse of `read`; see `ImageProcessor.to_hf`."""
    common = {
        "do_convert_rgb": True,
        "do_resize": image.resizes,
        "resample": _RESAMPLE[image.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        **write_decode(image),
    }
    square = {"height": image.size, "width": image.size}
    if image.mode == "squash":
        return {"image_processor_type": "SiglipImageProcessor", "size": square, **common}
    common["image_processor_type"] = "CLIPImageProcessor"
    if image.mode == "whole":
        return common | _whole(image, ours)
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


def _whole(image: Any, ours: bool) -> dict[str, Any]:
    size = {"shortest_edge": image.size}
    limit = {} if image.longest is None else {"longest_edge": image.longest}
    whole = {"size": size | limit, "do_center_crop": False}
    if image.multiple == 1:
        return whole
    if not ours:
        raise ConfigError(
            "Hugging Face's processors of these models pad to no multiple, found "
            f"{image.multiple}: export in the 'jax' layout, or with `multiple` 1."
        )
    _check_pad_colour(image)
    return whole | {"do_pad": True, "size_divisor": image.multiple}


def _check_pad_colour(image: Any) -> None:
    if image.pad_colour != _mean_colour(image.mean):
        raise ConfigError(
            f"Hugging Face pads with the mean colour {_mean_colour(image.mean)}, this "
            f"processor with {image.pad_colour}: use the mean colour to export."
        )


def read_decode(file: Settings, layout: Decoded = _HF) -> dict[str, Any]:
    """`exif` and `alpha` as a settings file of this library notes them.

    Args:
      layout: what they are where there is no note.
    """
    noted = file.section(DECODE_KEY, optional=True)
    return {
        "exif": noted.get("exif", FLAG, layout.exif),
        "alpha": noted.get("alpha", _ALPHA, layout.alpha),
    }


def write_decode(image: Decoded, layout: Decoded = _HF) -> dict[str, Any]:
    """The inverse of `read_decode`: nothing where images are decoded as the layout's code does."""
    if (image.exif, image.alpha) == (layout.exif, layout.alpha):
        return {}
    return {DECODE_KEY: {"exif": image.exif, "alpha": image.alpha}}


def _mode(file: Settings, size_of_model: int | None) -> dict[str, Any]:
    crops = file.get("do_center_crop", FLAG, "crop_size" in file)
    pads = file.get("do_pad", settings.Optional(FLAG), False) or False
    if not pads and file.content.get("size_divisor") is not None:
        raise ConfigError("preprocessor config: size_divisor without do_pad is not supported.")
    if not file.get("do_resize", FLAG, True):
        return _unresized(file, size_of_model, crops) | _multiple(file, pads)
    size = _size(file, "size")
    if not isinstance(size, int) and "shortest_edge" not in size:
        side = _square_side(size)
        if not crops:
            return {"mode": "squash", "size": side} | _multiple(file, pads)
        raise ConfigError(
            f"preprocessor config: expected size.shortest_edge with do_center_crop, found "
            f"{settings.shown(size.content)}."
        )
    shortest = size if isinstance(size, int) else size.get("shortest_edge", _SIDE)
    longest = None if isinstance(size, int) else size.get("longest_edge", _LONGEST, None)
    if not crops:
        if isinstance(size, int):
            return {"mode": "squash", "size": size} | _multiple(file, pads)
        whole = {"mode": "whole", "size": shortest, "longest": longest}
        return whole | _multiple(file, pads)
    if longest is not None:
        raise ConfigError(
            "preprocessor config: size.longest_edge together with do_center_crop is not supported."
        )
    crop = _size(file, "crop_size") if "crop_size" in file else shortest
    side = _square_side(crop)
    resize = None if shortest == side else shortest
    if not pads:
        return {"mode": _crop(file), "size": side, "resize": resize}
    colour = _mean_colour(file.get("image_mean", MEAN))
    return {"mode": "llava_pad", "size": side, "resize": resize, "pad_colour": colour}


def _crop(file: Settings) -> str:
    return file.get(_OUR_MODE, Choice(("hf_crop", "tv_crop")), "hf_crop")


def _unresized(file: Settings, size_of_model: int | None, crops: bool) -> dict[str, Any]:
    if crops:
        crop = _size(file, "crop_size")
        side = _square_side(crop)
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
    """What is padded where nothing is cropped."""
    if not pads:
        return {}
    multiple = file.get("size_divisor", settings.Optional(_SIDE), None)
    if multiple is None:
        raise ConfigError(
            "preprocessor config: do_pad without do_center_crop needs size_divisor, the multiple "
            "to which both sides are padded; padding to the largest of a batch is not supported."
        )
    return {"multiple": multiple, "pad_colour": _mean_colour(file.get("image_mean", MEAN))}


def _size(file: Settings, key: str) -> int | Settings:
    """A size as a number, or as an object that names sides."""
    named = isinstance(file.content.get(key), Mapping)
    return file.section(key) if named else file.get(key, _SIDE)


def _mean_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    return tuple(int(channel * 255) for channel in mean)


def _square_side(size: int | Settings) -> int:
    if isinstance(size, int):
        return size
    height, width = size.get("height", _SIDE, None), size.get("width", _SIDE, None)
    if height is None or height != width:
        found = settings.shown(size.content)
        raise ConfigError(f"preprocessor config: expected a square size, found {found}.")
    return height
