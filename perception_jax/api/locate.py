"""Resolves where a checkpoint is: a path, the name of shipped weights, or a hub id."""

from __future__ import annotations

import importlib.resources
import os
import pathlib
from typing import Any

from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop import hub
from perception_jax.settings import shown

SHIPPED = ("scenes-clip", "scenes-clip-fine", "scenes-ssl", "scenes-llava")
"""Weights in the package by name."""


def find(source: Any) -> pathlib.Path:
    """The folder or file of a checkpoint: a path, the name of shipped weights, or a hub id
    (`owner/name`, `owner/name:file.pth`), which is fetched.

    Raises:
      CheckpointError: there is no such thing.
      ConfigError: not a string or path, or an empty one.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ConfigError(
            f"checkpoint: expected a folder or file, shipped weights ({', '.join(SHIPPED)}) or a "
            f"hub id as a string or path, found {shown(source)}."
        )
    path = pathlib.Path(source)
    if path.is_dir():
        return path
    name = os.fspath(source)
    if name in SHIPPED:
        return shipped_folder(name)
    if path.is_file():
        return path
    if not hub.is_hub_id(name):
        raise CheckpointError(
            f"{name!r} is neither a folder or file, nor shipped weights ({', '.join(SHIPPED)}), "
            "nor a hub id of the form owner/name or owner/name:file."
        )
    return hub.fetch(name)


def is_repository(source: Any) -> bool:
    """Whether `find` would fetch the whole checkpoint of a hub id, `owner/name`."""
    if not isinstance(source, str) or source in SHIPPED or pathlib.Path(source).exists():
        return False
    return ":" not in source and hub.is_hub_id(source)


def shipped_folder(name: str) -> pathlib.Path:
    """Returns the folder of weights in the package."""
    return pathlib.Path(str(importlib.resources.files("perception_jax") / "weights" / name))
