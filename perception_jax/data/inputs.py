"""Normalises images and texts from callers, one or several, to checked lists."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import PIL.Image

from perception_jax.data import records
from perception_jax.errors import ConfigError
from perception_jax.settings import shown

_ENCODED = bytes | bytearray | memoryview


def as_texts(texts: Any, what: str = "texts") -> list[str]:
    """Returns a string or several as a list.

    Args:
      what: name of the argument, for messages.

    Raises:
      ConfigError: anything else, or a text with lone surrogates.
    """
    one = isinstance(texts, str)
    items = [texts] if one else _items(texts, what, "a string or a list of strings")
    for k, item in enumerate(items):
        if not isinstance(item, str):
            raise ConfigError(f"{what}[{k}]: expected a string, found {_kind(item)}.")
        if any("\ud800" <= character <= "\udfff" for character in item):
            raise ConfigError(
                f"{what}[{k}]: expected Unicode text, found half a surrogate pair in "
                f"{shown(item)}. Was it cut inside a character, or decoded twice?"
            )
    return [str(item) for item in items]


def as_images(images: Any, what: str = "images") -> list[records.Image | PIL.Image.Image]:
    """Returns an image or several as a list of inputs of `data.images.decode`.

    An image is a path, the bytes of an encoded file, a PIL image, or uint8[H, W, 3] of NumPy or
    JAX; uint8[B, H, W, 3] is several.

    Args:
      what: name of the argument, for messages.

    Raises:
      ConfigError: anything else.
    """
    if isinstance(images, str | os.PathLike | PIL.Image.Image | _ENCODED) or (
        isinstance(images, np.ndarray | jax.Array) and images.ndim < 4
    ):
        images = [images]
    items = _items(images, what, f"an image or a list of images ({_IMAGE})")
    return [_image(item, f"{what}[{k}]") for k, item in enumerate(items)]


_IMAGE = "a path, the bytes of a file, a PIL image, or a uint8 array [height, width, 3]"


def _image(item: Any, what: str) -> records.Image | PIL.Image.Image:
    if isinstance(item, _ENCODED):
        return bytes(item)
    if isinstance(item, PIL.Image.Image):
        return item
    if isinstance(item, np.ndarray | jax.Array):
        array = np.asarray(item)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise ConfigError(
                f"{what}: expected {_IMAGE}, found {_kind(item)}. Colours are 0 to 255, channels "
                "last."
            )
        return array
    if isinstance(item, str | os.PathLike) and isinstance(path := os.fspath(item), str):
        return pathlib.Path(path)
    raise ConfigError(f"{what}: expected {_IMAGE}, found {_kind(item)}.")


def _items(values: Any, what: str, expected: str) -> list[Any]:
    unordered = isinstance(values, Mapping | set | frozenset | _ENCODED)
    if unordered or not isinstance(values, Iterable):
        raise ConfigError(f"{what}: expected {expected}, found {_kind(values)}.")
    if isinstance(values, np.ndarray | jax.Array) and values.ndim == 0:
        raise ConfigError(f"{what}: expected {expected}, found {_kind(values)}.")
    return list(values)


def _kind(value: Any) -> str:
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array {value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__} ({shown(value)})"
