"""Locates the bytes of torch storages in a file: zip entries, or a stream of counted blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from perception_jax.errors import CheckpointError
from perception_jax.interop.tensors import TensorSpec, map_array
from perception_jax.settings import shown

_LOCAL_HEADER = 30
"""Bytes of a zip entry's local header before its name and extra field."""
_SPARE, _INFLATION = 64 * 2**20, 32
"""Bytes that a file may describe beyond its own size, and in multiples of it."""
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def check_total(path: pathlib.Path, nbytes: int) -> None:
    """Refuses a small file that describes far more than it holds: by tensors that share a storage,
    strides of zero, or compression (torch stores uncompressed).

    Raises:
      CheckpointError: `nbytes`, of all that the file describes, is out of proportion.
    """
    size = path.stat().st_size
    if nbytes > _SPARE + _INFLATION * size:
        raise CheckpointError(
            f"Expected at most {_SPARE + _INFLATION * size} bytes of tensors in {path}, a file of "
            f"{size} bytes; found {nbytes}. If you trust it, load it in torch and save its state "
            f"dict as safetensors."
        )


@contextlib.contextmanager
def open_archive(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive; faults become `CheckpointError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"Expected a whole zip archive in {path}: {error}. Copy the file again."
        ) from error


def read_entry(path: pathlib.Path, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """Reads an entry and compares its checksum.

    Args:
      limit: bytes, whatever the directory says; never more are unpacked.

    Raises:
      CheckpointError: it is longer, shorter than the directory says, or packed in another way than
        torch does.
    """
    entry = archive.getinfo(name)
    if entry.compress_type not in _METHODS or entry.file_size > limit:
        raise CheckpointError(
            f"Expected at most {limit} bytes, stored or deflated, in the entry {shown(name)} of "
            f"{path}, found {entry.file_size} by method {entry.compress_type}."
        )
    with archive.open(entry) as file:
        raw = file.read(entry.file_size)  # a number, so that no more than that is unpacked
        raw += file.read(1)
    if len(raw) != entry.file_size:
        raise CheckpointError(
            f"Expected {entry.file_size} bytes in the entry {shown(name)} of {path}, found "
            f"{len(raw)}. Copy the file again."
        )
    return raw


@runtime_checkable
class Storages(Protocol):
    """The storages of one file, by key."""

    def nbytes(self, key: str) -> int | None:
        """Size of a storage; None if there is none of this key."""

    def read(self, key: str, offset: int, spec: TensorSpec) -> np.ndarray:
        """`spec` at `offset` bytes into a storage; bounds are the caller's concern."""

    def check(self, key: str) -> None:
        """Compares the bytes with the checksum, if the container has one."""


class ZipStorages:
    """Entries `<archive>/data/<key>` of a zip archive.

    Raises:
      CheckpointError: an entry reaches over the end of the file or has no valid header.
    """

    def __init__(self, path: pathlib.Path, entries: Sequence[zipfile.ZipInfo], prefix: str):
        self._path = path
        self._entries = {
            entry.filename.removeprefix(prefix): entry
            for entry in entries
            if entry.filename.startswith(prefix)
        }
        self._checked: set[str] = set()
        packed = (e for e in self._entries.values() if e.compress_type != zipfile.ZIP_STORED)
        check_total(path, sum(entry.file_size for entry in packed))
        size = path.stat().st_size
        with open(path, "rb") as file:
            self._starts = {k: _data_start(path, file, e, size) for k, e in self._entries.items()}

    def nbytes(self, key: str) -> int | None:
        entry = self._entries.get(key)
        return None if entry is None else entry.file_size

    def read(self, key: str, offset: int, spec: TensorSpec) -> np.ndarray:
        entry = self._entries[key]
        if entry.compress_type == zipfile.ZIP_STORED:
            return map_array(self._path, self._starts[key] + offset, spec)
        return self._unpack(entry)[offset : offset + spec.nbytes].view(spec.dtype)

    def check(self, key: str) -> None:
        entry = self._entries[key]
        if key in self._checked:
            return
        self._checked.add(key)
        raw = self.read(key, 0, TensorSpec((entry.file_size,), np.dtype(np.uint8)))
        if (found := zlib.crc32(raw)) != entry.CRC:
            raise CheckpointError(
                f"Expected CRC-32 {entry.CRC:08x} of {entry.filename} in {self._path}, found "
                f"{found:08x}: the file was damaged after it was written. Copy it again."
            )

    def _unpack(self, entry: zipfile.ZipInfo) -> np.ndarray:
        with open_archive(self._path) as archive:
            raw = read_entry(self._path, archive, entry.filename, entry.file_size)
        return np.frombuffer(raw, np.uint8)


@dataclasses.dataclass(frozen=True)
class _Block:
    start: int
    nbytes: int


class LegacyStorages:
    """The blocks that follow the pickles of an old file: a count of elements, then the elements.

    Raises:
      CheckpointError: the blocks do not fit the file.
    """

    def __init__(
        self,
        path: pathlib.Path,
        file: io.BufferedIOBase,
        keys: Any,
        dtypes: Mapping[str, np.dtype | None],
    ):
        self._path = path
        self._blocks: dict[str, _Block] = {}
        size = os.fstat(file.fileno()).st_size
        for key in keys if isinstance(keys, list) else []:
            head = file.read(8)
            if not isinstance(key, str) or key in self._blocks or len(head) < 8:
                raise CheckpointError(
                    f"Expected storage {shown(key)} once and whole in {path}: the file is damaged "
                    f"or truncated. Copy it again."
                )
            count, dtype = int.from_bytes(head, "little"), dtypes.get(key)
            block = _Block(file.tell(), count * (1 if dtype is None else dtype.itemsize))
            if block.start + block.nbytes > size:
                raise CheckpointError(
                    f"Expected {block.nbytes} bytes of storage {shown(key)} in {path}, found "
                    f"{size - block.start}: the file is truncated. Copy it again."
                )
            file.seek(block.nbytes, os.SEEK_CUR)
            self._blocks[key] = block

    def nbytes(self, key: str) -> int | None:
        block = self._blocks.get(key)
        return None if block is None else block.nbytes

    def read(self, key: str, offset: int, spec: TensorSpec) -> np.ndarray:
        return map_array(self._path, self._blocks[key].start + offset, spec)

    def check(self, key: str) -> None:
        """The old container has no checksums."""


def _data_start(
    path: pathlib.Path, file: io.BufferedIOBase, entry: zipfile.ZipInfo, size: int
) -> int:
    """Offset of an entry's bytes; the local header may be longer than the directory says."""
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04" or len(header) < _LOCAL_HEADER:
        raise CheckpointError(f"Expected a zip entry {entry.filename} in {path}, found none there.")
    name, extra = (int.from_bytes(header[k : k + 2], "little") for k in (26, 28))
    start = entry.header_offset + _LOCAL_HEADER + name + extra
    sizes = {zipfile.ZIP_STORED: entry.file_size, zipfile.ZIP_DEFLATED: entry.compress_size}
    if sizes.get(entry.compress_type) != entry.compress_size:
        raise CheckpointError(
            f"Expected {entry.filename} in {path} to be stored or deflated, found method "
            f"{entry.compress_type} with {entry.compress_size} of {entry.file_size} bytes."
        )
    if start + entry.compress_size > size:
        raise CheckpointError(f"Expected all of {entry.filename} in {path}: the file is truncated.")
    return start
