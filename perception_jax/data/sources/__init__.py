"""Readers of datasets on disk; each is a `data.records.Source`.

`open_source(path, kind=...)` opens a dataset as one of these kinds:

- "folder": a folder of images, `folder.ImageFolder`
- "jsonl": JSON lines in this library's own format, `jsonl.JsonlSource`
- "objects": JSON lines of one object each, `objects.ObjectLines`
- "moinst": canonical MOInst records, `data.moinst.source.MoinstSource`
- "llava": LLaVA's conversations about images, a JSON list or lines, `llava.LlavaSource`
- "coco": COCO, LVIS and files like them, `coco.CocoSource`
- "parquet": a Parquet file or a folder of them, `parquet.ParquetSource`

Without a kind it is guessed where what is found leaves no doubt: by the ending and by the keys of
the first line or of the whole file. Where there is doubt, that is an error which names the kinds.

`tfds.TfdsSource` takes what `tfds.data_source` gives.
"""

from __future__ import annotations

import inspect
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from perception_jax.data import records, text_lines
from perception_jax.data.sources import coco, fields, folder, jsonl, llava, objects, parquet
from perception_jax.errors import ConfigError, DataError, did_you_mean

KINDS = ("folder", "jsonl", "objects", "moinst", "llava", "coco", "parquet")
"""Values of `kind` for `open_source`."""

_LINE_ENDINGS = (".jsonl", ".ndjson")
_ENDINGS = {
    "coco": (".json",),
    "llava": (".json", *_LINE_ENDINGS),
    **dict.fromkeys(("jsonl", "objects", "moinst"), _LINE_ENDINGS),
}
_GUESSED = (*_LINE_ENDINGS, ".json", ".parquet")
_PEEKED = 2**16
"""Bytes at the start of a file by which its kind is guessed."""


def open_source(
    path: str | os.PathLike, *, kind: str | None = None, **options: Any
) -> records.Source:
    """Opens a dataset.

    Args:
      path: a file or a folder. Of a kind that is one file, a folder with one such file will do.
      kind: one of `KINDS`; None or "" guesses, see the module.
      options: of the reader, e.g. `outside="clip"`, `images=...`, `caption_column=...`.

    Raises:
      ConfigError: an unknown kind, or an option that the reader does not have.
      DataError: no kind is certain (naming what was found), or the reader found a fault.
    """
    if kind and kind not in KINDS:
        raise ConfigError(f"kind: there is no {kind!r}{did_you_mean(kind, KINDS)}")
    found = pathlib.Path(path)
    kind, place = (kind, _place(found, kind)) if kind else _guess(found)
    reader = _reader(kind)
    known = [name for name in inspect.signature(reader).parameters if name != "path"]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"{reader.__name__}({path}): unknown option {name!r}{did_you_mean(name, known)}"
            )
    return reader(place, **options)


def open_part(
    path: str | os.PathLike,
    *,
    test: bool,
    test_path: str | os.PathLike = "",
    test_every: int = 0,
    kind: str | None = None,
    **options: Any,
) -> records.Source | None:
    """Opens the records that train, or those that test.

    Args:
      test: which of the two.
      test_path: a dataset of its own that tests; without one each `test_every`-th record of `path`
        does, and none if that is 0.
      kind, options: of `open_source`.

    Returns:
      The records; None if none test.

    Raises:
      As `open_source` and `combine.split`.
    """
    from perception_jax.data.sources.combine import split

    if test and not (test_path or test_every):
        return None
    found = open_source(test_path if test and test_path else path, kind=kind, **options)
    return found if test_path or not test_every else split(found, every=test_every)[int(test)]


def _reader(kind: str) -> Callable[..., records.Source]:
    if kind == "moinst":
        from perception_jax.data.moinst import source  # it needs this package

        return source.MoinstSource
    return {
        "folder": folder.ImageFolder,
        "jsonl": jsonl.JsonlSource,
        "objects": objects.ObjectLines,
        "llava": llava.LlavaSource,
        "coco": coco.CocoSource,
        "parquet": parquet.ParquetSource,
    }[kind]


def _place(path: pathlib.Path, kind: str) -> pathlib.Path:
    """The file of a kind that is a file, if a folder is given."""
    if kind not in _ENDINGS or not path.is_dir():
        return path
    return _only(path, _files(path, _ENDINGS[kind]), " or ".join(_ENDINGS[kind]))


def _guess(path: pathlib.Path) -> tuple[str, pathlib.Path]:
    if path.is_dir():
        return _guess_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: expected a file or a folder, found nothing there.")
    ending = path.suffix.lower()
    if ending == ".parquet":
        return "parquet", path
    if ending in _LINE_ENDINGS:
        return _guess_lines(path), path
    if ending == ".json":
        if llava.is_list(path):
            return "llava", path
        # The reader itself makes sure that it is such a file.
        return _kind_of_line(_first_line(path)) or "coco", path
    raise DataError(
        f"{path}: expected a file ending in {', '.join(_GUESSED)}, or a folder; found "
        f"{path.suffix or 'no ending'!r}. {_say_kind()}"
    )


def _guess_folder(path: pathlib.Path) -> tuple[str, pathlib.Path]:
    lines, tables = _files(path, _LINE_ENDINGS), _files(path, (".parquet",))
    if lines and tables:
        raise _several(path, "one kind of file", [*lines, *tables])
    if lines:
        file = _only(path, lines, ".jsonl")
        return _guess_lines(file), file
    if tables:
        return "parquet", path
    annotations = [file for file in _files(path, (".json",)) if _may_annotate(file)]
    if folder.contains_images(path):
        if annotations:
            raise DataError(
                f"{path}: expected images alone, found {annotations[0].name}, which may annotate "
                'them. Name that file, or open the images without it with kind="folder".'
            )
        return "folder", path
    if len(annotations) == 1:
        return "coco", annotations[0]
    raise DataError(
        f"{path}: no reader fits this folder. Tried: one .jsonl file in it (none), .parquet files "
        f"in it (none), images in it or below it (none). {_say_kind()}"
    )


def _guess_lines(path: pathlib.Path) -> str:
    """The kind of JSON lines, by the keys of the first."""
    first = next(text_lines.lines(path), None)
    if first is None:
        return "jsonl"  # whose reader says that nothing is in it
    content = fields.parse_json(first.text, f"{path}:{first.number}")
    kind = _kind_of_line(content)
    if kind is None:
        keys = fields.keys_of(fields.mapping(content, f"{path}:{first.number}"))
        raise DataError(
            f"{path}:{first.number}: expected the keys of one of the kinds of lines: 'image' "
            "(jsonl), 'image', 'class' and 'caption' (objects), 'conversations' (llava), or "
            f"'image_id', 'file' and 'objects' (moinst); found {keys}. {_say_kind()}"
        )
    return kind


def _kind_of_line(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    if {"image_id", "file", "objects"} <= content.keys():
        return "moinst"
    if llava.KEY in content:
        return "llava"
    if "image" in content and "class" in content:
        return "objects"
    if "annotations" in content:  # a whole COCO file on one line
        return None
    own = content.keys() & jsonl.CONTENT
    text_alone = content.keys() <= {"text", "id", "extras"}  # other formats have texts as well
    return "jsonl" if own - {"text"} or (own and text_alone) else None


def _first_line(path: pathlib.Path) -> Any:
    """The JSON value of the first line; None if that line is long or no whole value."""
    with open(path, "rb") as file:
        first = file.readline(_PEEKED)
    try:
        return fields.parse_json(first.decode("utf-8-sig"), str(path))
    except (UnicodeDecodeError, DataError):
        return None


def _may_annotate(path: pathlib.Path) -> bool:
    """Whether a JSON file next to images looks like COCO's."""
    with open(path, "rb") as file:
        start = file.read(_PEEKED)
        file.seek(max(0, path.stat().st_size - _PEEKED))
        ends = start + file.read(_PEEKED)
    return b'"images"' in ends or b'"annotations"' in ends


def _files(path: pathlib.Path, endings: Sequence[str]) -> list[pathlib.Path]:
    return sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in endings and not file.name.startswith(".") and file.is_file()
    )


def _only(path: pathlib.Path, files: Sequence[pathlib.Path], ending: str) -> pathlib.Path:
    if not files:
        raise DataError(f"{path}: expected one {ending} file in it, found none.")
    if len(files) > 1:
        raise _several(path, f"one {ending} file", files)
    return files[0]


def _several(path: pathlib.Path, expected: str, files: Sequence[pathlib.Path]) -> DataError:
    found = ", ".join(file.name for file in files[:8]) + (", …" if len(files) > 8 else "")
    return DataError(f"{path}: expected {expected}, found {found}. Name the one to read.")


def _say_kind() -> str:
    return f"Say which it is with kind=, one of {', '.join(KINDS)}."
