"""Parquet files with an image column and a caption column, as the Hugging Face hub serves them.

Needs pyarrow (the extra `eval`).
"""

from __future__ import annotations

import collections
import functools
import importlib.util
import os
import pathlib
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from perception_jax.data import records
from perception_jax.data.sources import fields
from perception_jax.errors import ConfigError, DataError, did_you_mean

_CACHED_GROUPS = 4


class ParquetSource:
    """Random access to rows.

    A row is read together with its row group, and the last few groups are kept: shuffled reading
    wants files written with small groups (`pq.write_table(..., row_group_size=100)`).

    Args:
      path: a file, or a folder of them (read in the order of their names).
      image_column: encoded files as binary, or as the hub's {"bytes", "path"}.
      caption_column: a text or a list of texts; None for images without captions.
      id_column: integers or texts; None for file name and row number.

    Raises:
      ConfigError: pyarrow is missing.
      DataError: no such file or column (naming the nearest), a column of another type, or a file
        that is not Parquet.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        image_column: str = "image",
        caption_column: str | None = "caption",
        id_column: str | None = None,
    ) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise ConfigError("Parquet needs pyarrow: pip install 'perception_jax[eval]'.")
        self._files = _parquet_files(pathlib.Path(path))
        self._image, self._caption, self._id = image_column, caption_column, id_column
        self._columns = [c for c in (image_column, caption_column, id_column) if c is not None]
        groups, rows = [], []
        for number, file in enumerate(self._files):
            opened = _open(file)
            _check_schema(opened.schema_arrow, self._columns, file)
            _check_types(opened.schema_arrow, file, image_column, caption_column, id_column)
            metadata = opened.metadata
            for group in range(metadata.num_row_groups):
                groups.append((number, group))
                rows.append(metadata.row_group(group).num_rows)
            opened.close()
        self._groups = np.array(groups, np.int64).reshape(-1, 2)
        self._starts = np.concatenate([[0], np.cumsum(np.array(rows, np.int64))])
        if not len(self):
            raise DataError(f"{path}: expected rows, found none.")
        self._cache = _GroupCache()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> records.Record:
        fields.check_index(index, len(self))
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        number, group = self._groups[place].tolist()
        file = self._files[number]
        read = functools.partial(_read_group, file, group, self._columns)
        table = self._cache.get((number, group), read)
        first_group = int(np.searchsorted(self._groups[:, 0], number))
        row_number = index - int(self._starts[first_group])
        row = {}
        for name in table:
            try:
                row[name] = table[name][index - int(self._starts[place])].as_py()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}: row {row_number}: {name}: expected UTF-8 text ({error})."
                ) from None
        return self._record(row, file, row_number)

    def _record(self, row: dict[str, Any], file: pathlib.Path, number: int) -> records.Record:
        image = row[self._image]
        image = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(image, bytes):
            raise DataError(
                f"{file}: row {number}: {self._image}: expected an image's bytes, found none."
            )
        if self._id is not None and row[self._id] in (None, ""):
            raise DataError(f"{file}: row {number}: {self._id}: expected an id, found none.")
        name = f"{file.name}:{number}" if self._id is None else str(row[self._id])
        captions: Any = () if self._caption is None else row[self._caption]
        captions = (captions,) if isinstance(captions, str) else tuple(captions or ())
        return records.Record(
            id=name, images=(image,), captions=tuple(text for text in captions if text)
        )


class _GroupCache:
    """The last few row groups; belongs to one process, shared by its threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _GroupCache, ()

    def get(self, key: tuple[int, int], read: Any) -> Any:
        with self._lock:
            if key not in self._groups:
                self._groups[key] = read()
                while len(self._groups) > _CACHED_GROUPS:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]


def _parquet_files(path: pathlib.Path) -> list[pathlib.Path]:
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(f"{path}: expected a Parquet file or a folder of *.parquet, found neither.")
    return files


def _open(file: pathlib.Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a whole Parquet file ({error}). Fetch it again.") from error


def _read_group(file: pathlib.Path, group: int, columns: list[str]) -> dict[str, Any]:
    import pyarrow

    opened = _open(file)
    try:
        table = opened.read_row_group(group, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: row group {group} cannot be read ({error}).") from error
    finally:
        opened.close()
    return {name: table.column(name) for name in columns}


def _check_schema(schema: Any, columns: Iterable[str], file: pathlib.Path) -> None:
    for column in columns:
        if column not in schema.names:
            hint = did_you_mean(column, schema.names)
            raise DataError(
                f"{file}: there is no column {column!r}{hint} Columns are chosen with "
                "image_column, caption_column and id_column."
            )


def _check_types(
    schema: Any, file: pathlib.Path, image: str, caption: str | None, identity: str | None
) -> None:
    """Raises `DataError` if a column is not of its kind."""
    import pyarrow.types as types

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind) or types.is_null(kind)

    def is_list(kind: Any) -> bool:
        return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)

    kind = schema.field(image).type
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (types.is_binary(kind) or types.is_large_binary(kind)):
        raise DataError(f"{file}: {image}: expected binary or a struct with 'bytes', found {kind}.")
    if caption is not None:
        kind = schema.field(caption).type
        if not is_text(kind.value_type if is_list(kind) else kind):
            raise DataError(f"{file}: {caption}: expected texts or lists of them, found {kind}.")
    if identity is not None:
        kind = schema.field(identity).type
        if not (is_text(kind) or types.is_integer(kind)):
            raise DataError(f"{file}: {identity}: expected texts or whole numbers, found {kind}.")
