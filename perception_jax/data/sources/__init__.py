"""Readers of datasets on disk; each is a `data.records.Source`.

`open_source` picks the reader by what it finds:

- a folder of images → `folder.ImageFolder`
- a `.jsonl` file, or a folder with one → `jsonl.JsonlSource`, or `data.moinst.source.MoinstSource`
  if its lines are canonical MOInst records
- a `.json` file → `coco.CocoSource` (COCO and LVIS)
- a `.parquet` file, or a folder of them → `parquet.ParquetSource`

`tfds.TfdsSource` takes what `tfds.data_source` gives.
"""

from __future__ import annotations

import inspect
import os
import pathlib
from typing import Any

from perception_jax.data import records
from perception_jax.data.sources import coco, fields, folder, jsonl, parquet
from perception_jax.errors import ConfigError, DataError


def open_source(path: str | os.PathLike, **options: Any) -> records.Source:
    """Opens a dataset with the reader that fits.

    Args:
      path: see the module.
      options: of the reader, e.g. `outside="clip"`, `images=...`, `caption_column=...`.

    Raises:
      ConfigError: an option that the reader does not have.
      DataError: no reader fits (naming all that was tried), or the reader found a fault.
    """
    found = pathlib.Path(path)
    reader, place = _find_reader(found)
    known = [name for name in inspect.signature(reader).parameters if name != "path"]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{reader.__name__}({path}): unknown option {name!r}{fields.nearest(name, known)}"
            )
    return reader(place, **options)


def _find_reader(path: pathlib.Path) -> tuple[type, pathlib.Path]:
    by_suffix = {
        ".jsonl": jsonl.JsonlSource,
        ".json": coco.CocoSource,
        ".parquet": parquet.ParquetSource,
    }
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix in by_suffix:
            return _jsonl_reader(path) if suffix == ".jsonl" else by_suffix[suffix], path
        raise DataError(
            f"{path}: expected a file ending in {', '.join(by_suffix)}, or a folder; found "
            f"{path.suffix or 'no ending'!r}."
        )
    if not path.is_dir():
        raise DataError(f"{path}: expected a file or a folder, found nothing there.")
    lines = sorted(path.glob("*.jsonl"))
    if len(lines) == 1:
        return _jsonl_reader(lines[0]), lines[0]
    if len(lines) > 1:
        names = ", ".join(file.name for file in lines)
        raise DataError(f"{path}: expected one .jsonl file, found {names}. Name the one to read.")
    if any(path.glob("*.parquet")):
        return parquet.ParquetSource, path
    if folder.contains_images(path):
        return folder.ImageFolder, path
    raise DataError(
        f"{path}: no reader fits this folder. Tried: one .jsonl file in it (none), .parquet files "
        "in it (none), images in it or below it (none). A COCO or LVIS .json is named itself."
    )


def _jsonl_reader(path: pathlib.Path) -> type:
    from perception_jax.data.moinst import source  # it needs this package

    return source.MoinstSource if source.is_canonical(path) else jsonl.JsonlSource
