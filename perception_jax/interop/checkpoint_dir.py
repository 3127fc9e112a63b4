"""Finds and opens the weights of a checkpoint: one file, or a folder with or without shards.

Folders are those of Hugging Face, open_clip and timm; our own layout is the same with our names.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perception_jax import settings
from perception_jax.errors import CheckpointError
from perception_jax.interop.gguf_file import GgufFile
from perception_jax.interop.safetensors_io import SafetensorsFile
from perception_jax.interop.tensors import TensorFiles
from perception_jax.interop.torch_reader import open_torch

INDEX = "model.safetensors.index.json"
"""File name of the index of sharded weights."""
SINGLE = "model.safetensors"
"""File name of unsharded weights."""
PLAIN = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Weights of Hugging Face, timm and ours. A single file comes before an index, as in transformers:
`save_pretrained` leaves the index of an earlier save in shards next to it."""
OPEN_CLIP_SINGLE = "open_clip_model.safetensors"
"""File name of open_clip's unsharded weights."""
OPEN_CLIP = (OPEN_CLIP_SINGLE, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Weights of open_clip, which may be next to those of Hugging Face or timm."""
_TORCH_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
GGUF_SUFFIX = ".gguf"
"""Suffix of llama.cpp's files."""
WEIGHT_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES, GGUF_SUFFIX)
"""Suffixes of files with weights."""
INDEX_SUFFIX = ".index.json"
"""Suffix of an index of sharded weights."""
_MAX_SUBFOLDERS = 100


class PrefixedFiles(TensorFiles):
    """The tensors whose names begin with a prefix, which is removed from the names.

    Attributes:
      aside: names of all the others.

    Raises:
      CheckpointError: no name begins with the prefix.
    """

    def __init__(self, files: TensorFiles, prefix: str):
        self._files, self._prefix = files, prefix
        self.specs = {
            name[len(prefix) :]: spec
            for name, spec in files.specs.items()
            if name.startswith(prefix) and name != prefix
        }
        self.aside = tuple(name for name in files if name == prefix or not name.startswith(prefix))
        if not self.specs:
            first = {".".join(name.split(".")[:2]) + "." for name in files}
            raise CheckpointError(
                f"Expected names that begin with the prefix {prefix!r}, found names that begin "
                f"with {', '.join(sorted(first)[:12])}"
            )

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._prefix + name]

    def check(self, name: str) -> None:
        self._files.check(self._prefix + name)


class JoinedFiles(TensorFiles):
    """Several files as one checkpoint.

    Raises:
      CheckpointError: two files hold a tensor of the same name.
    """

    def __init__(self, files: Mapping[str, TensorFiles]):
        owners = collections.defaultdict(list)
        for label, file in files.items():
            for name in file:
                owners[name].append(label)
        for name, labels in owners.items():
            if len(labels) > 1:
                raise CheckpointError(
                    f"Expected each tensor in one shard, found {name!r} in {labels}."
                )
        self._owners = {name: files[labels[0]] for name, labels in owners.items()}
        self.specs = {name: file.specs[name] for name, file in self._owners.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._owners[name][name]

    def check(self, name: str) -> None:
        self._owners[name].check(name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files of a checkpoint's weights.

    Attributes:
      path: the file of weights, or the index of its shards.
      left: names of other weights and indexes in the folder, which are not read.
    """

    path: pathlib.Path
    left: tuple[str, ...] = ()


PREFERRED = (*PLAIN[:2], *OPEN_CLIP[:2], *PLAIN[2:], *OPEN_CLIP[2:])
"""Names of weights in a folder in order of preference: safetensors before torch files."""


def find_weights(path: str | os.PathLike[str], *, prefer: Sequence[str] = PREFERRED) -> WeightFiles:
    """Finds the weights to read in a folder: the most preferred name, or the only file.

    Args:
      path: a folder, in which sub-folders are looked into where it has no weights of its own; or a
        file, which is taken as it is.

    Raises:
      CheckpointError: there are none, or several without a name to prefer.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return WeightFiles(path=path)
    found = _weights_in(path, prefer)
    if found is not None:
        return found
    inside = [one for folder in _subfolders(path) if (one := _weights_in(folder, prefer))]
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(repr(str(one.path.parent.relative_to(path))) for one in inside[:8])
        raise CheckpointError(
            f"Expected weights in {path} or in one of its folders, found several: {names}. Give "
            "one of these folders as the path."
        )
    present = sorted(item.name for item in path.iterdir())
    raise CheckpointError(
        f"Expected weights in {path}, e.g. {SINGLE} or {INDEX}, found {present[:20]}."
    )


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    section: str | None = None,
    prefer: Sequence[str] = PREFERRED,
) -> TensorFiles:
    """The tensors of a checkpoint file or folder; nothing but headers is read.

    Args:
      path: a `.safetensors`, `.bin`, `.pth`, `.pt` or `.ckpt` file, or a folder that holds one or
        an index of shards.
      section: for torch files that hold several models, the dotted name of the one to read.
      prefer: file names of a folder in order of preference; by default safetensors before formats
        that need the restricted reader.

    Raises:
      CheckpointError: nothing to read is there, a shard is missing, or a file is damaged, refused
        or of an unknown format.
    """
    path = find_weights(path, prefer=prefer).path
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path, section)
    if not path.is_file():
        raise CheckpointError(f"Expected a checkpoint file or folder at {path}, found nothing.")
    return _open_file(path, section)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object, e.g. a checkpoint's `config.json`.

    Raises:
      CheckpointError: the file is missing, or is not a JSON object.
    """
    value = settings.read_json(path, error=CheckpointError)
    if not isinstance(value, dict):
        raise CheckpointError(f"Expected a JSON object in {path}, found {settings.shown(value)}.")
    return value


def is_inner_path(name: str) -> bool:
    """Whether a relative path, split by "/", stays inside the folder that it is joined to."""
    return all(is_plain_name(part) for part in name.split("/"))


def is_plain_name(name: str) -> bool:
    """Whether a name is that of something directly in the folder that it is joined to."""
    return name not in ("", ".", "..") and "\\" not in name and pathlib.Path(name).name == name


def _open_file(path: pathlib.Path, section: str | None) -> TensorFiles:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in _TORCH_SUFFIXES:
        return open_torch(path, section=section)
    if path.suffix == GGUF_SUFFIX:
        return GgufFile(path)
    raise CheckpointError(
        f"Expected a file that ends in one of {', '.join(WEIGHT_SUFFIXES)}, found {path}."
    )


def _weights_in(folder: pathlib.Path, prefer: Sequence[str]) -> WeightFiles | None:
    """The weights directly in a folder; None if there are none."""
    present = sorted(item.name for item in folder.iterdir() if item.is_file())
    weights = [name for name in present if name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))]
    for name in prefer:
        if name in weights:
            return _chosen(folder, name, weights)
    for suffixes in ((".safetensors",), _TORCH_SUFFIXES, (GGUF_SUFFIX,)):
        found = [name for name in weights if name.endswith(suffixes)]
        if len(found) == 1:
            return _chosen(folder, found[0], weights)
        if found:
            raise CheckpointError(
                f"Expected one weights file or an index in {folder}, found {found}. Give the file "
                f"itself as the path."
            )
    return None


def _chosen(folder: pathlib.Path, name: str, weights: Sequence[str]) -> WeightFiles:
    shards = _shard_names(folder / name) if name.endswith(INDEX_SUFFIX) else ()
    left = tuple(other for other in weights if other != name and other not in shards)
    return WeightFiles(path=folder / name, left=left)


def _subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Folders one and two levels down, hidden ones and links left out."""
    level, found = [folder], []
    for _ in range(2):
        level = [
            item
            for parent in level
            for item in sorted(parent.iterdir())
            if item.is_dir() and not item.is_symlink() and not item.name.startswith(".")
        ][:_MAX_SUBFOLDERS]
        found += level
    return found


def _shard_names(index: pathlib.Path) -> list[str]:
    return sorted(set(_weight_map(index).values()))


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise CheckpointError(f'Expected "weight_map": name → file in {index}.')
    return names


def _open_shards(index: pathlib.Path, section: str | None) -> TensorFiles:
    names = _weight_map(index)
    shards = sorted(set(names.values()))
    _check_shards(index, shards)
    joined = JoinedFiles({shard: _open_file(index.parent / shard, section) for shard in shards})
    if missing := sorted(names.keys() - joined.keys()):
        raise CheckpointError(
            f"Expected all tensors that {index} lists in its shards, found {len(missing)} nowhere, "
            f"e.g. {missing[0]!r} in {names[missing[0]]}. Copy the folder again."
        )
    return joined


def _check_shards(index: pathlib.Path, shards: Sequence[str]) -> None:
    for shard in shards:
        if not is_inner_path(shard):
            raise CheckpointError(f"Expected plain file names in {index}, found {shard!r}.")
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise CheckpointError(
            f"Expected {len(shards)} shards next to {index}, missing: {', '.join(missing[:8])}. "
            f"Copy them into the folder."
        )
