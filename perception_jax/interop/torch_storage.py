"""Where the bytes of torch storages lie in a file: zip entries, or a stream of counted blocks."""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from perception_jax.errors import CheckpointError
from perception_jax.interop.tensors import TensorSpec, map_array

_LOCAL_HEADER = 30
"""Bytes of a zip entry's local header before its name and extra field."""
_MAX_COMPRESSED = 4 * 2**30
"""Bytes a compressed entry may grow to; torch stores its entries uncompressed."""


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
        with open(path, "rb") as file:
            self._starts = {k: _data_start(path, file, e) for k, e in self._entries.items()}

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
        if entry.file_size > _MAX_COMPRESSED:
            raise CheckpointError(
                f"Expected at most {_MAX_COMPRESSED} bytes in the compressed entry "
                f"{entry.filename} of {self._path}, found {entry.file_size}."
            )
        try:
            with zipfile.ZipFile(self._path) as archive:
                return np.frombuffer(archive.read(entry.filename), np.uint8)
        except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
            raise CheckpointError(
                f"Expected a readable entry {entry.filename} in {self._path}: {error}."
            ) from error


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
            count = int.from_bytes(file.read(8), "little")
            dtype = dtypes.get(key) if isinstance(key, str) else None
            block = _Block(file.tell(), count * (1 if dtype is None else dtype.itemsize))
            if block.start + block.nbytes > size:
                raise CheckpointError(
                    f"Expected {block.nbytes} bytes of storage {key!r} in {path}, found "
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


def _data_start(path: pathlib.Path, file: io.BufferedIOBase, entry: zipfile.ZipInfo) -> int:
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
    if start + entry.compress_size > path.stat().st_size:
        raise CheckpointError(f"Expected all of {entry.filename} in {path}: the file is truncated.")
    return start
