"""Reads GGUF files, llama.cpp's format: metadata and tensors, quantised ones as float32.

The header is parsed here in bounded memory; the package `gguf` (extra [gguf]), whose own parser
takes seconds for a vocabulary, is needed for quantised tensors alone.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import struct
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from perception_jax.errors import CheckpointError
from perception_jax.interop.tensors import (
    MAX_NAME,
    MAX_RANK,
    TensorFiles,
    TensorSpec,
    fits_memory,
    map_array,
)

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_VALUES = 2**24
"""Largest number of values in all of the metadata, and of tensors."""
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""NumPy dtypes of the scalar types of metadata."""
_STRING, _ARRAY = 8, 9
_PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 30: np.dtype(ml_dtypes.bfloat16)}
"""Types of tensors that are not quantised."""


class GgufFile(TensorFiles):
    """A GGUF file.

    Attributes:
      metadata: values by name, e.g. `llama.block_count`; arrays are lists.

    Raises:
      CheckpointError: no such file, a damaged one, or one that is quantised in a way that the
        installed package `gguf` does not know; or that package is missing.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = pathlib.Path(path)
        try:
            with open(self._path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                raw = np.memmap(file, np.uint8, "r") if size else np.empty(0, np.uint8)
            header = _Header(memoryview(raw))
            self.metadata: Mapping[str, Any] = header.metadata()
            self._tensors = header.tensors(self.metadata.get("general.alignment", 32))
        except (OSError, ValueError, struct.error) as error:
            raise CheckpointError(
                f"Expected a GGUF file at {self._path}, found otherwise: {error}. Is the download "
                "complete?"
            ) from error
        for name, tensor in self._tensors.items():
            if tensor.offset + tensor.stored(self._path).nbytes > size:
                raise CheckpointError(
                    f"Expected the tensor {name!r} inside of {self._path}, found that the file "
                    "ends before it does. Is the download complete?"
                )
        self.specs = {
            name: TensorSpec(tensor.shape, _PLAIN.get(tensor.kind, np.dtype(np.float32)))
            for name, tensor in self._tensors.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        array = map_array(self._path, tensor.offset, tensor.stored(self._path))
        if tensor.kind in _PLAIN:
            return array
        package = _package(self._path)
        kind = package.GGMLQuantizationType(tensor.kind)
        return package.quants.dequantize(array, kind).reshape(tensor.shape)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor is: type number, shape, and offset in the file."""

    kind: int
    shape: tuple[int, ...]
    offset: int

    def stored(self, path: pathlib.Path) -> TensorSpec:
        """Shape and dtype of its bytes."""
        if self.kind in _PLAIN:
            return TensorSpec(self.shape, _PLAIN[self.kind])
        package = _package(path)
        try:
            kind = package.GGMLQuantizationType(self.kind)
            block, size = package.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"Expected tensors of a type that the installed gguf knows in {path}, found "
                f"{self.kind}: pip install --upgrade gguf."
            ) from error
        if not self.shape or self.shape[-1] % block:
            raise CheckpointError(
                f"Expected rows of whole blocks of {block} in {path}, found a tensor of shape "
                f"{self.shape}. Is the file damaged?"
            )
        bytes_each = self.shape[-1] // block * size
        return TensorSpec((*self.shape[:-1], bytes_each), np.dtype(np.uint8))


class _Header:
    """Reads the header of a file from its bytes, in order; `ValueError` where it is damaged."""

    def __init__(self, raw: memoryview):
        self._raw, self._at, self._values = raw, 0, 0
        if bytes(self._bytes(4)) != _MAGIC:
            raise ValueError(f"it does not begin with {_MAGIC!r}")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}, not one of {_VERSIONS}")
        self._tensor_count, self._value_count = self._number("<Q"), self._number("<Q")

    def metadata(self) -> dict[str, Any]:
        """The values; to be called first."""
        return self._named(self._value_count, lambda: self._value(self._number("<I")))

    def tensors(self, alignment: Any) -> dict[str, _Tensor]:
        """The tensors, in the file's order."""
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        found = self._named(self._tensor_count, self._tensor)
        start = -(-self._at // alignment) * alignment
        return {
            name: dataclasses.replace(one, offset=start + one.offset) for name, one in found.items()
        }

    def _named(self, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._count(count)
        for _ in range(count):
            name = self._string()
            if name in found or len(name) > MAX_NAME:
                raise ValueError(f"the name {name[:80]!r} twice, or too long")
            found[name] = read()
        return found

    def _tensor(self) -> _Tensor:
        rank = self._number("<I")
        if rank > MAX_RANK:
            raise ValueError(f"a tensor with {rank} axes")
        shape = tuple(self._number("<Q") for _ in range(rank))[::-1]
        if not fits_memory(shape):
            raise ValueError(f"a tensor of shape {shape}")
        return _Tensor(kind=self._number("<I"), shape=shape, offset=self._number("<Q"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalars(kind, 1)[0]
        kind, count = self._number("<I"), self._number("<Q")
        self._count(count)
        if kind == _STRING:
            return [self._string() for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"metadata of the type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self._bytes(count * dtype.itemsize), dtype)
        # Float32 by its shortest decimal form: 1e-5, as the settings of the model had it.
        return [float(str(x)) for x in values] if dtype == np.float32 else values.tolist()

    def _string(self) -> str:
        return bytes(self._bytes(self._number("<Q"))).decode("utf-8", "surrogateescape")

    def _number(self, form: str) -> int:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _bytes(self, count: int) -> memoryview:
        if self._at + count > len(self._raw):
            raise ValueError(f"it ends in the header, at {len(self._raw)} bytes")
        self._at += count
        return self._raw[self._at - count : self._at]

    def _count(self, count: int) -> None:
        self._values += count
        if self._values > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES} values in the header")


def _package(path: pathlib.Path) -> ModuleType:
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise CheckpointError(
            f"{path} holds quantised tensors, which the package gguf decodes: "
            "pip install 'perception_jax[gguf]'"
        ) from error
    return gguf
