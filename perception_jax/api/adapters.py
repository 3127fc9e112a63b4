"""Adapters of a method with the backbone that they were trained on (files: `interop.adapters`)."""

from __future__ import annotations

import os
import pathlib
import typing
from collections.abc import Sequence

import jax
import numpy as np

from perception_jax import settings
from perception_jax.api.backbones import TEXT_SOURCE, load_backbone
from perception_jax.api.loaded import Loaded
from perception_jax.api.locate import SHIPPED, shipped_folder
from perception_jax.data.processors import ImageProcessor, Mode
from perception_jax.errors import CheckpointError
from perception_jax.interop.adapters import AdapterFile, backbone_of

_SIZE, _MODE = "image_size", "image_mode"
"""Metadata keys of the images in training."""


def find_adapters(
    source: str | os.PathLike[str],
    *,
    name: str,
    shipped: Sequence[str] = (),
    missing_ok: bool = False,
) -> pathlib.Path:
    """Path of a file of adapters.

    Args:
      source: that path, the folder of the file, or one of `shipped`.
      name: of the file in a folder.
      shipped: names of adapters in the package.
      missing_ok: whether the file may be missing.

    Raises:
      CheckpointError: it is missing.
    """
    path = pathlib.Path(source)
    if not path.exists() and os.fspath(source) in shipped:
        path = shipped_folder(os.fspath(source))
    path = path / name if path.is_dir() else path
    if missing_ok or path.is_file():
        return path
    raise CheckpointError(
        f"{path}: no adapters there. Expected a file of them, a folder that holds {name}, or "
        f"shipped ones ({', '.join(shipped)}); an encoder without adapters is given as `backbone`."
    )


def load_backbone_of(
    adapters: pathlib.Path,
    backbone: str | os.PathLike[str] | None = None,
    *,
    text: str | os.PathLike[str] = TEXT_SOURCE,
    dtype: np.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
    trusted: Sequence[str] = (),
) -> Loaded:
    """Loads the backbone of adapters, with the image size and mode of their training.

    Args:
      adapters: their file.
      backbone: instead of the one in the same folder, or that the file names.
      text, dtype, mesh: as of `load_backbone`.
      trusted: backbones that the file may name besides shipped ones and those in its folder.

    Raises:
      CheckpointError: the file is damaged or names no backbone that may be loaded.
    """
    if backbone is None:
        backbone = backbone_of(adapters, shipped=SHIPPED, trusted=trusted)
    loaded = load_backbone(backbone, text=text, dtype=dtype, mesh=mesh)
    file = AdapterFile(adapters)
    size = file.setting(_SIZE, settings.IMAGE_SIZE, None)
    if size is None:
        return loaded
    mode = file.setting(_MODE, settings.Choice(typing.get_args(Mode)), None)
    return loaded.at_size(size, mode=mode)


def image_metadata(processor: ImageProcessor) -> dict[str, str]:
    """Entries of an adapter file's metadata that `load_backbone_of` reads."""
    return {_SIZE: str(processor.size), _MODE: processor.mode}
