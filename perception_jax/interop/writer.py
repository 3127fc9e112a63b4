"""Writes a checkpoint folder atomically.

Everything is written into a temporary folder next to the target, synced, and renamed at the end.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import INDEX, SINGLE, is_plain_name
from perception_jax.interop.safetensors_io import write_safetensors
from perception_jax.interop.tensors import LazyTensor

MAX_SHARD = 5 * 10**9
"""Largest shard in bytes, as usual on the hub."""


def write_checkpoint(
    directory: str | os.PathLike[str],
    tensors: Iterable[LazyTensor],
    config: Mapping[str, Any] | None = None,
    extras: Mapping[str, bytes | str | Mapping[str, Any]] | None = None,
    *,
    weights: str = SINGLE,
    max_shard_bytes: int = MAX_SHARD,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes `model.safetensors` (or shards and their index), `config.json` and further files.

    Args:
      directory: the folder to make; its parents are made too.
      tensors: e.g. from `export_params`; host memory holds one at a time.
      config: contents of `config.json`; None writes none.
      extras: file name → contents; a mapping is written as JSON.
      weights: name of the weights' file where they are not split.
      max_shard_bytes: a larger checkpoint is split; a tensor is never split.
      metadata: further entries of the header of each file of weights.
      overwrite: replace a folder that is not empty. The old one stays until the new one is whole.

    Raises:
      CheckpointError: the folder is not empty, the disk is full or the files cannot be written.
        Nothing half-written remains.
    """
    target = pathlib.Path(directory).resolve()
    files = dict(extras or {})
    if config is not None:
        files["config.json"] = config
    shards = _split(list(tensors), max_shard_bytes)
    for name in files:
        if not is_plain_name(name):
            raise CheckpointError(f"Expected plain names of extra files, found {name!r}.")
    nbytes = sum(t.spec.nbytes for shard in shards for t in shard)
    with replacing_folder(target, nbytes=nbytes, overwrite=overwrite) as folder:
        _write_shards(folder, shards, weights, metadata or {})
        for name, content in files.items():
            _write_file(folder / name, content)


def write_file(
    path: str | os.PathLike[str],
    tensors: Sequence[LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file atomically, replacing an older one of that name.

    Raises:
      CheckpointError: the disk is full, the file cannot be written, or as `write_safetensors`.
    """
    target = pathlib.Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(temporary, tensors, metadata)
        os.replace(temporary, target)
        _sync(target.parent)
    except OSError as error:
        raise _failure(target, sum(tensor.spec.nbytes for tensor in tensors), error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_target(target: pathlib.Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"Expected a folder or nothing at {target}, found a file.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise CheckpointError(
            f"Expected an empty or new folder at {target}, found files in it. Choose another, or "
            f"pass overwrite=True to replace it."
        )


def _split(tensors: Sequence[LazyTensor], limit: int) -> list[list[LazyTensor]]:
    shards: list[list[LazyTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.nbytes
    return shards


@contextlib.contextmanager
def replacing_folder(
    target: pathlib.Path, *, nbytes: int = 0, overwrite: bool = False
) -> Iterator[pathlib.Path]:
    """A temporary folder that becomes `target` if the body succeeds, and is removed if not.

    Args:
      target: new or empty, unless `overwrite`; its parents are made.
      nbytes: that the body will write; checked against what is free.

    Raises:
      CheckpointError: the folder is not empty, the disk is full or it cannot be written.
    """
    _check_target(target, overwrite)
    folder = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise OSError(errno.ENOSPC, f"{nbytes} bytes needed, {free} free")
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield folder
        _sync(folder)
        _swap(folder, target)
    except OSError as error:
        raise _failure(target, nbytes, error) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _failure(target: pathlib.Path, nbytes: int, error: OSError) -> CheckpointError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    size = f"{nbytes / 2**20:,.1f} MiB to " if nbytes else ""
    return CheckpointError(
        f"Expected to write {size}{target}: {error}. "
        + ("Free some space or choose another disk. " if full else "")
        + "Nothing was written."
    )


def _swap(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Puts `folder` in the place of `target`; what was there goes last."""
    os.chmod(folder, 0o777 & ~_umask())
    old = None
    if target.is_dir() and any(target.iterdir()):
        old = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        os.replace(target, old)
    try:
        os.replace(folder, target)
    except OSError:
        if old is not None:
            os.replace(old, target)
        raise
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_shards(
    folder: pathlib.Path,
    shards: Sequence[Sequence[LazyTensor]],
    single: str,
    metadata: Mapping[str, str],
) -> None:
    # transformers looks for this entry before it accepts a file.
    metadata = {"format": "pt", **metadata}
    if len(shards) == 1:
        write_safetensors(folder / single, shards[0], metadata)
        return
    names: dict[str, str] = {}
    for k, shard in enumerate(shards):
        file_name = f"model-{k + 1:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file_name, shard, metadata)
        for tensor in shard:
            if tensor.name in names:
                raise CheckpointError(f"Expected each tensor once, found {tensor.name!r} twice.")
            names[tensor.name] = file_name
    total = sum(tensor.spec.nbytes for shard in shards for tensor in shard)
    _write_file(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": names})


def _write_file(path: pathlib.Path, content: bytes | str | Mapping[str, Any]) -> None:
    if isinstance(content, Mapping):
        content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if isinstance(content, str):
        content = content.encode("utf-8")
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: pathlib.Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
