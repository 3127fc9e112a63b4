"""Reading and writing safetensors files.

The format: 8 bytes little-endian header length, a JSON header (name → dtype, shape, byte range;
`__metadata__` → strings), then the tensors' bytes without gaps. Reading maps the file and trusts
nothing in the header; writing streams one tensor at a time and stores a CRC-32 of each under
`__metadata__`, which other readers leave alone.
"""

from __future__ import annotations

import collections
import io
import json
import math
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perception_jax.errors import CheckpointError
from perception_jax.interop.buffers import contiguous
from perception_jax.interop.tensors import (
    DTYPE_NAMES,
    DTYPES,
    MAX_NAME,
    MAX_RANK,
    LazyTensor,
    TensorFiles,
    TensorSpec,
    fits_memory,
    map_array,
)
from perception_jax.settings import parse_json, shown

MAX_HEADER = 100_000_000
"""Largest header in bytes, a limit of the format."""

_CHECKSUMS = "crc32"
_PREFIX = 8
_ALIGN = 64


class SafetensorsFile(TensorFiles):
    """A safetensors file with a fully checked header.

    Attributes:
      metadata: the header's `__metadata__`.

    Raises:
      CheckpointError: the file is missing, truncated or not a valid safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        header, data_start, data_size = _read_header(self.path)
        self.metadata = _metadata(self.path, header.pop("__metadata__", {}))
        self.specs, self._offsets = _entries(self.path, header, data_size)
        self._data_start = data_start
        self._checksums = _checksums(self.path, self.metadata)

    def __getitem__(self, name: str) -> np.ndarray:
        return map_array(self.path, self._data_start + self._offsets[name], self.specs[name])

    def check(self, name: str) -> None:
        expected = self._checksums.get(name)
        if expected is None:
            return
        found = _crc(self[name])
        if found != expected:
            raise CheckpointError(
                f"Expected CRC-32 {expected} of tensor {name!r} in {self.path}, found {found}: the "
                f"file was damaged after it was written. Copy or export it again."
            )


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Sequence[LazyTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a new file, one tensor at a time, and syncs it.

    Args:
      path: must not exist.
      tensors: in the order in which their bytes are stored.
      metadata: strings for the header, e.g. {"format": "pt"}.

    Raises:
      CheckpointError: a name occurs twice, a dtype has no name in the format, or a tensor turns
        out to have another shape or dtype than announced.
      OSError: the file cannot be written.
    """
    checksums: dict[str, str] = {tensor.name: "0" * 8 for tensor in tensors}
    if len(checksums) != len(tensors):
        counts = collections.Counter(tensor.name for tensor in tensors)
        twice = sorted(name for name, count in counts.items() if count > 1)
        raise CheckpointError(f"Expected each tensor once in {path}, found twice: {twice}.")
    header = _encode_header(tensors, metadata, checksums)
    with open(path, "xb") as file:
        file.write(header)
        for tensor in tensors:
            array = _read_as_announced(tensor)
            checksums[tensor.name] = _crc(array)
            _write_bytes(file, array)
        file.seek(0)
        file.write(_encode_header(tensors, metadata, checksums))
        file.flush()
        os.fsync(file.fileno())


def _read_header(path: pathlib.Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, where the data starts, and how many bytes of data there are."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(_PREFIX), "little")
            if size < _PREFIX or length > min(MAX_HEADER, size - _PREFIX):
                raise CheckpointError(
                    f"Expected a safetensors header of at most {max(size - _PREFIX, 0)} bytes in "
                    f"{path}, found a length of {length}: the file is truncated or of another "
                    f"format, e.g. a Git LFS pointer that was never fetched. Copy it again."
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"Expected a readable file at {path}: {error}.") from error
    header = parse_json(raw, f"the JSON header of {path}", error=CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(f"Expected a JSON object as header of {path}, found {shown(header)}.")
    return header, _PREFIX + length, size - _PREFIX - length


def _metadata(path: pathlib.Path, value: Any) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise CheckpointError(f"Expected strings in __metadata__ of {path}, found {shown(value)}.")


def _checksums(path: pathlib.Path, metadata: Mapping[str, str]) -> dict[str, str]:
    text = metadata.get(_CHECKSUMS, "{}")
    checksums = parse_json(text, f"the checksums of {path}", error=CheckpointError)
    if not isinstance(checksums, dict):
        raise CheckpointError(f"Expected name → CRC-32 in the checksums of {path}.")
    return checksums


def _entries(
    path: pathlib.Path, header: Mapping[str, Any], data_size: int
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    """Specs and offsets of all tensors; their ranges must tile the data exactly."""
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    end, before = 0, "the header"
    for name, (spec, begin) in sorted(entries.items(), key=lambda i: (i[1][1], i[1][0].nbytes)):
        if begin != end:
            kind = "overlaps" if begin < end else "leaves a gap after"
            raise CheckpointError(
                f"Expected tensor {shown(name)} of {path} to start at byte {end} of the data, "
                f"found {begin}: it {kind} {before}. The header is damaged."
            )
        end, before = begin + spec.nbytes, shown(name)
    if end != data_size:
        kind = "truncated" if data_size < end else "followed by bytes that belong to no tensor"
        raise CheckpointError(
            f"Expected {end} bytes of tensors in {path}, found {data_size}: the file is {kind}. "
            f"Copy it again."
        )
    specs = {name: spec for name, (spec, _) in entries.items()}
    return specs, {name: begin for name, (_, begin) in entries.items()}


def _entry(path: pathlib.Path, name: str, entry: Any) -> tuple[TensorSpec, int]:
    """One line of the header, checked: spec and first byte."""
    where = f"tensor {shown(name)} of {path}"
    if len(name) > MAX_NAME:
        raise CheckpointError(f"Expected a name of at most {MAX_NAME} characters for {where}.")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"Expected dtype, shape and data_offsets for {where}, found {shown(entry)}."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"Expected one of the dtypes {', '.join(DTYPES)} for {where}, found {shown(dtype)}."
        )
    if not _are_sizes(shape) or len(shape) > MAX_RANK or not fits_memory(shape):
        raise CheckpointError(
            f"Expected at most {MAX_RANK} sizes as shape of {where}, found {shown(shape)}."
        )
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"Expected two data_offsets for {where}, found {shown(offsets)}.")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"Expected {nbytes} bytes for {where} ({dtype} {shape}), found the range {offsets}. "
            f"The header is damaged."
        )
    return TensorSpec(tuple(shape), DTYPES[dtype]), offsets[0]


def _are_sizes(value: Any) -> bool:
    """A list of non-negative integers that numpy can count with."""
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 2**48 for item in value
    )


def _encode_header(
    tensors: Sequence[LazyTensor],
    metadata: Mapping[str, str] | None,
    checksums: Mapping[str, str],
) -> bytes:
    """Length and JSON, padded with spaces so that the data starts on a cache line."""
    header: dict[str, Any] = {
        "__metadata__": {**(metadata or {}), _CHECKSUMS: json.dumps(checksums)}
    }
    end = 0
    for tensor in tensors:
        dtype = DTYPE_NAMES.get(tensor.spec.dtype)
        if dtype is None:
            raise CheckpointError(
                f"Expected one of the dtypes {', '.join(DTYPES)} for tensor {tensor.name!r}, found "
                f"{tensor.spec.dtype}. Cast it before writing."
            )
        begin, end = end, end + tensor.spec.nbytes
        header[tensor.name] = {
            "dtype": dtype,
            "shape": list(tensor.spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(_PREFIX + len(text)) % _ALIGN)
    return len(text).to_bytes(_PREFIX, "little") + text


def _read_as_announced(tensor: LazyTensor) -> np.ndarray:
    array = contiguous(tensor.read())
    if TensorSpec(array.shape, array.dtype) != tensor.spec:
        raise CheckpointError(
            f"Expected {tensor.spec} for tensor {tensor.name!r}, as announced, found shape "
            f"{array.shape} and dtype {array.dtype}."
        )
    return array


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """The elements in order as uint8; the format is little-endian, as is every host JAX runs on."""
    return array.reshape(-1).view(np.uint8)


def _crc(array: np.ndarray) -> str:
    return f"{zlib.crc32(_as_bytes(array)):08x}"


def _write_bytes(file: io.BufferedIOBase, array: np.ndarray) -> None:
    if array.size:
        file.write(_as_bytes(array).data)
