"""Conversations in LLaVA's format: a JSON list, or JSON lines, of rows such as

    {"id": "000000033471", "image": "coco/train2017/000000033471.jpg",
     "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                       {"from": "gpt", "value": "A bus."}]}

"image" is a path below the folder of images, or a list of such paths; a row without it (or with
null) is text alone. Other keys are ignored. LLaVA-Pretrain (558K), CC595k, LLaVA-Instruct (158k)
and mix665k are such lists. The ids of mix665k are not unique, so that a record's id begins with the
number of its row.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator
from typing import Any

from perception_jax.data import text_lines
from perception_jax.data.records import Record, Turn
from perception_jax.data.sources import fields
from perception_jax.data.sources.json_list import IndexedList
from perception_jax.errors import DataError, did_you_mean

KEY = "conversations"
"""Key by which a row of this format is recognised."""
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
"""Our roles by those of the format."""
_SAMPLED = 16
"""Images by which a wrong folder is noticed at once."""


class LlavaSource:
    """Random access to the rows of a file (see the module); every row is checked at construction,
    and read again on request, so that a large file takes little memory.

    Texts are kept verbatim, with their placeholders "<image>". Images are opened when they are
    used.

    Args:
      path: the file.
      images: the folder that "image" is relative to; None for the file's own.

    Raises:
      DataError: naming file, row and key; or the folder has none of the first images.
    """

    def __init__(self, path: str | os.PathLike, *, images: str | os.PathLike | None = None) -> None:
        self._path = pathlib.Path(path)
        self._images = self._path.parent if images is None else pathlib.Path(images)
        if not self._path.is_file():
            raise DataError(f"{path}: expected a file of conversations, found no such file.")
        if not self._images.is_dir():
            raise DataError(f"{images}: expected the folder of the images, found no such folder.")
        self._rows = IndexedList(self._path) if is_list(self._path) else _Lines(self._path)
        sample: list[pathlib.Path] = []
        for number, (where, row) in enumerate(self._rows.scan()):
            images = self._record(number, row, where).images
            sample += images if len(sample) < _SAMPLED else ()
        if sample and not any(image.is_file() for image in sample):
            raise DataError(
                f"{path}: expected its images below {self._images}, found none of the first "
                f"{len(sample)}, e.g. {sample[0]}. Give the folder that the paths start from."
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        fields.check_index(index, len(self))
        return self._record(index, self._rows[index], self._rows.place(index))

    def _record(self, number: int, row: Any, where: str) -> Record:
        own = fields.mapping(row, where).get("id")
        name = "" if own is None else fields.any_text(str(own), f"{where}: id")
        turns = fields.required(row, KEY, fields.list_of(_turn), where)
        if not turns:
            raise DataError(
                f"{where}: {KEY}: expected at least one turn, found none. Remove the row."
            )
        return Record(
            id=f"{number}:{name}" if name else str(number),
            images=tuple(self._images / path for path in _paths(row.get("image"), where)),
            conversation=turns,
        )


def is_list(path: str | os.PathLike) -> bool:
    """Whether a file begins as a JSON list. Raises `DataError` if it cannot be read."""
    with text_lines.opened(path) as file:
        return file.read(2**12).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


class _Lines:
    """Rows one a line, with the methods of `IndexedList`."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path, self._lines = path, text_lines.IndexedLines(path)

    def scan(self) -> Iterator[tuple[str, Any]]:
        for line in self._lines.scan():
            where = f"{self._path}:{line.number}"
            yield where, fields.parse_json(line.text, where)

    def place(self, index: int) -> str:
        return f"{self._path}:{self._lines[index].number}"

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Any:
        line = self._lines[index]
        return fields.parse_json(line.text, f"{self._path}:{line.number}")


def _paths(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    where = f"{where}: image"
    check = fields.list_of(fields.file_name) if isinstance(value, list) else fields.file_name
    found = check(value, where)
    return (found,) if isinstance(found, str) else found


def _turn(value: Any, where: str) -> Turn:
    role = fields.required(value, "from", fields.any_text, where)
    if role not in ROLES:
        raise DataError(
            f'{where}: from: expected "human" (questions) or "gpt" (answers), found {role[:60]!r}'
            f"{did_you_mean(role[:60], ROLES)}"
        )
    return Turn(role=ROLES[role], text=fields.required(value, "value", fields.any_text, where))
