"""Embeddings of images in files: `.npy`, or Parquet with a column of lists."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

from perception_jax.errors import ConfigError, DataError, did_you_mean

COLUMN = "embedding"
"""Column of a Parquet file that is read unless another one is named."""
_NAMES = ("path", "image", "file_name", "id")
_SUFFIXES = (".npy", ".parquet")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Embeddings:
    """Embeddings of images.

    Attributes:
      vectors: one row for each image; may be a memory map.
      names: of the images, or None where the file has none.
    """

    vectors: Float[np.ndarray, "N D"]
    names: tuple[str, ...] | None = None


def is_embedding_file(source: str) -> bool:
    """Whether a source is embeddings: `FILE.npy`, `FILE.parquet` or `FILE.parquet:COLUMN`."""
    return pathlib.Path(_split(source)[0]).suffix.lower() in _SUFFIXES


def read_embeddings(source: str) -> Embeddings:
    """Reads a file of embeddings; see `is_embedding_file`.

    Names come from the first column of a Parquet file that is called path, image, file_name or id
    and has texts or whole numbers.

    Raises:
      ConfigError: Parquet without pyarrow.
      DataError: the file cannot be read, has no such column, or no matrix of floating-point
        numbers.
    """
    name, column = _split(source)
    path = pathlib.Path(name)
    if not path.is_file():
        raise DataError(f"{path}: expected a file of embeddings, found no such file.")
    names = None
    if path.suffix.lower() == ".npy":
        vectors = _npy(path)
    else:
        vectors, names = _parquet(path, column or COLUMN)
    if vectors.ndim != 2 or not vectors.size or not np.issubdtype(vectors.dtype, np.floating):
        raise DataError(
            f"{path}: expected a matrix of floating-point numbers, one row for each image, found "
            f"{vectors.dtype}{list(vectors.shape)}."
        )
    return Embeddings(vectors=vectors, names=names)


def _split(source: str) -> tuple[str, str]:
    """File and column."""
    name, mark, column = source.rpartition(":")
    return (name, column) if mark and name.lower().endswith(".parquet") else (source, "")


def _npy(path: pathlib.Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a .npy file that can be read ({error}).") from error


def _parquet(path: pathlib.Path, column: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow: pip install 'perception_jax[eval]'.") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                hint = did_you_mean(column, schema.names)
                raise DataError(f"{path}: there is no column {column!r}{hint}")
            named = next((name for name in _NAMES if _has_names(schema, name)), None)
            table = file.read(columns=[column, *([named] if named else [])])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}).") from error
    names = None if named is None else tuple(map(str, table.column(named).to_pylist()))
    return _matrix(table.column(column), f"{path}: {column}"), names


def _has_names(schema: Any, name: str) -> bool:
    import pyarrow.types as types

    if name not in schema.names:
        return False
    kind = schema.field(name).type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)


def _matrix(column: Any, where: str) -> Float[np.ndarray, "N D"]:
    """A column of equally long lists of numbers."""
    import pyarrow.compute
    import pyarrow.types as types

    kind = column.type
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not lists or not types.is_floating(kind.value_type):
        raise DataError(f"{where}: expected lists of floating-point numbers, found {kind}.")
    parts = []
    for chunk in column.chunks:
        flat = chunk.flatten().to_numpy(zero_copy_only=False)
        lengths = pyarrow.compute.list_value_length(chunk).fill_null(0).unique().to_pylist()
        if len(lengths) > 1 or lengths == [0]:
            raise DataError(f"{where}: expected lists of one length, found {sorted(lengths)[:4]}.")
        parts.append(flat.reshape(len(chunk), -1))
    if len({part.shape[1] for part in parts}) != 1:
        raise DataError(f"{where}: expected lists of one length, found several.")
    return np.concatenate(parts)
