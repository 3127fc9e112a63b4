"""Descriptions of tensors that have not been read: name, shape, dtype, location.

`TensorFiles` is the common interface of this package to a checkpoint in any format:
a mapping from names to arrays that are mapped on access and unmapped when dropped, with shapes and
dtypes known beforehand. A plain `dict` of numpy arrays serves wherever a `TensorFiles` does.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from perception_jax.errors import CheckpointError

Shape = tuple[int, ...]
"""Shape of a tensor."""

MAX_RANK = 32
"""Largest number of axes of a tensor."""
MAX_NAME = 1024
"""Largest number of characters of a tensor name."""

# Names as the safetensors format spells them.
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""NumPy dtypes by safetensors name."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""Safetensors names by NumPy dtype."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor that has not been read."""

    shape: Shape
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True, slots=True)
class LazyTensor:
    """A named tensor that is computed on request, so that a writer holds one at a time."""

    name: str
    spec: TensorSpec
    read: Callable[[], np.ndarray]


class TensorFiles(Mapping[str, np.ndarray], abc.ABC):
    """A checkpoint's tensors by name.

    `files[name]` is a read-only view of the mapped file: indexing it reads only the pages touched,
    and the mapping goes away with the last view, so resident memory does not grow.
    """

    specs: Mapping[str, TensorSpec]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    @abc.abstractmethod
    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor; `KeyError` if there is none of this name."""

    def check(self, name: str) -> None:
        """Compares the tensor's bytes with the file's checksum, if the format stores one.

        Raises:
          CheckpointError: the bytes have changed since they were written.
        """


def fits_memory(shape: Sequence[int]) -> bool:
    """Whether numpy can represent an array of that shape, even if it is empty."""
    return math.prod(size or 1 for size in shape) < 2**48


def tensor_specs(files: Mapping[str, np.ndarray]) -> Mapping[str, TensorSpec]:
    """Returns shapes and dtypes of a checkpoint without reading the data."""
    if isinstance(files, TensorFiles):
        return files.specs
    return {name: TensorSpec(array.shape, array.dtype) for name, array in files.items()}


def map_array(path: pathlib.Path, offset: int, spec: TensorSpec) -> Shaped[np.ndarray, "*S"]:
    """A read-only view of `spec.nbytes` bytes of a file, mapped for as long as the view lives.

    Raises:
      CheckpointError: the file cannot be mapped or has become shorter than it was.
    """
    if not spec.nbytes:
        return np.empty(spec.shape, spec.dtype)
    try:
        raw = np.memmap(path, np.uint8, "r", offset, spec.nbytes)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Expected {spec.nbytes} bytes at offset {offset} of {path}, which was readable a "
            f"moment ago; now: {error}. Is another process writing this file?"
        ) from error
    return np.asarray(raw).view(spec.dtype).reshape(spec.shape)
