"""A checkpoint with its settings, before its model is identified.

The settings say in which format they are written, and so whose names to expect:

- "hf": `config.json` of Hugging Face, with a `model_type`;
- "timm": `config.json` of timm, with an `architecture`;
- "reference": `open_clip_config.json`, or a model configuration of open_clip;
- "jax": our own, marked by `perception_jax_layout`;
- "gguf": the metadata of a GGUF file, whatever is next to it.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import (
    OPEN_CLIP,
    PLAIN,
    PrefixedFiles,
    find_weights,
    open_checkpoint,
    read_json,
)
from perception_jax.interop.gguf_file import GgufFile
from perception_jax.interop.tensors import TensorFiles
from perception_jax.settings import shown

Layout = Literal["hf", "reference", "timm", "jax"]
"""Name of a checkpoint layout: Hugging Face, the authors', timm, or this library's."""

CONFIG = "config.json"
"""File name of the settings in Hugging Face, timm and our own folders."""
OPEN_CLIP_CONFIG = "open_clip_config.json"
"""File name of open_clip's settings."""

_WEIGHTS = {"hf": PLAIN, "timm": PLAIN, "jax": PLAIN, "reference": (*OPEN_CLIP, *PLAIN)}
"""What to look for in a folder, by layout; a single file of another name serves as well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """The settings of a checkpoint and the files they come from.

    Attributes:
      layout: of the settings, a `Layout` or "gguf"; None without any.
      settings: as parsed; empty without any.
      folders: where files for a processor may be, in order of preference.
      read: "settings", and "weights" of a `CheckpointSource` → the files they come from.
    """

    layout: str | None
    settings: Mapping[str, Any]
    folders: tuple[pathlib.Path, ...]
    read: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSource(CheckpointSettings):
    """An opened checkpoint: tensors, settings and the files they come from.

    Attributes:
      path: of the weights: a file, or the index of its shards.
      files: the tensors.
      aside: names outside the requested part.
      left: files of weights or settings next to them → why they were not read.
    """

    path: pathlib.Path
    files: TensorFiles
    aside: tuple[str, ...]
    left: Mapping[str, str]


def read_settings(folder: pathlib.Path) -> CheckpointSettings | None:
    """Reads the settings in a folder that may have no weights; None if there are none, or several,
    of which the weights would tell which to take.

    Raises:
      CheckpointError: a damaged file.
    """
    files = [folder / name for name in (CONFIG, OPEN_CLIP_CONFIG) if (folder / name).is_file()]
    if len(files) != 1:
        return None
    settings = read_json(files[0])
    return CheckpointSettings(
        layout=_layout(settings, files[0]),
        settings=settings,
        folders=(folder,),
        read={"settings": str(files[0])},
    )


def open_source(
    path: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    section: str | None = None,
    prefix: str = "",
) -> CheckpointSource:
    """Opens the weights at `path`, and the settings that are given or found next to them.

    Args:
      path: a folder, or a single file with weights.
      config: settings, or a JSON file or folder with them; None searches next to the weights.
      section: for torch files that hold several models, the dotted name of the one to read.
      prefix: only tensors whose names begin so are seen, without it.

    Raises:
      CheckpointError: a file is missing, damaged or refused, or no name has the prefix.
    """
    path = pathlib.Path(path)
    folder = _folder_of(path)
    settings, file = _settings(folder, config)
    layout = _layout(settings, file or folder)
    weights = find_weights(
        folder if path.is_dir() else path, prefer=_WEIGHTS.get(layout, (*PLAIN, *OPEN_CLIP))
    )
    files = open_checkpoint(weights.path, section=section)
    if isinstance(files, GgufFile):
        settings, layout, file = files.metadata, "gguf", weights.path
    aside: tuple[str, ...] = ()
    if prefix:
        files = PrefixedFiles(files, prefix)
        aside = files.aside
    left = dict.fromkeys(weights.left, f"other weights than {weights.path.name}")
    if file is not None:
        others = (name for name in (CONFIG, OPEN_CLIP_CONFIG) if (file.parent / name).is_file())
        left |= {name: "of other weights" for name in others if name != file.name}
    given = {"settings": str(file)} if file else {"settings": "given as `config`"}
    return CheckpointSource(
        path=weights.path,
        files=files,
        layout=layout,
        settings=settings,
        folders=tuple(dict.fromkeys(f for f in (file and file.parent, folder) if f is not None)),
        aside=aside,
        read={"weights": str(weights.path)} | (given if settings else {}),
        left=left,
    )


def _folder_of(path: pathlib.Path) -> pathlib.Path:
    """The folder with the settings: that of the weights, which may be in a sub-folder."""
    if not path.is_dir():
        return path.parent
    if any((path / name).is_file() for name in (CONFIG, OPEN_CLIP_CONFIG)):
        return path
    return find_weights(path, prefer=(*PLAIN, *OPEN_CLIP)).path.parent


def _settings(
    folder: pathlib.Path, config: str | os.PathLike[str] | Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], pathlib.Path | None]:
    """The settings and the file they come from."""
    if isinstance(config, Mapping):
        return config, None
    if config is None:
        file = _settings_file(folder)
        return (read_json(file) if file else {}), file
    given = pathlib.Path(config)
    if not given.is_dir():
        return read_json(given), given
    if (file := _settings_file(given)) is None:
        raise CheckpointError(
            f"Expected {CONFIG} or {OPEN_CLIP_CONFIG} in {given}, found "
            f"{sorted(item.name for item in given.iterdir())[:20]}."
        )
    return read_json(file), file


def _settings_file(folder: pathlib.Path) -> pathlib.Path | None:
    """The file that describes the weights in a folder; of two, the one of the larger model."""
    plain, open_clip = folder / CONFIG, folder / OPEN_CLIP_CONFIG
    if not (plain.is_file() and open_clip.is_file()):
        return next((file for file in (plain, open_clip) if file.is_file()), None)

    def holds(names: Sequence[str]) -> bool:
        return any((folder / name).is_file() for name in names)

    # timm's configuration describes the image tower alone, Hugging Face's all of the model.
    if holds(OPEN_CLIP) and ("architecture" in read_json(plain) or not holds(PLAIN)):
        return open_clip
    return plain


def _layout(settings: Mapping[str, Any], where: pathlib.Path) -> Layout | None:
    if not settings:
        return None
    ours = settings.get("perception_jax_layout")
    if ours not in (None, "jax", "hf"):
        raise CheckpointError(
            f"Expected perception_jax_layout 'jax' in the settings of {where}, found {shown(ours)}."
        )
    if ours == "jax":
        return "jax"
    if "model_cfg" in settings or "vision_cfg" in settings:
        return "reference"
    return "timm" if "architecture" in settings else "hf"
