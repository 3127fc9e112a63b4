"""Large JSON files that are one list: the place of each value in the file, read again on request.

A list of 665,000 conversations (1 GB) takes 11 MB of memory, and while it is scanned the text of a
few values.
"""

from __future__ import annotations

import array
import codecs
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from perception_jax.data import text_lines
from perception_jax.data.sources import fields
from perception_jax.errors import DataError

MAX_VALUE = text_lines.MAX_LINE
"""Largest value of a list in characters; a larger one is an error."""

_BLOCK = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class IndexedList:
    """Random access to the values of a file that is a JSON list."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = path
        self._starts, self._sizes = array.array("q"), array.array("q")

    def scan(self) -> Iterator[tuple[str, Any]]:
        """Yields place (for messages) and value of all, and notes where they are; to be finished
        before any other access.

        Raises:
          DataError: the file cannot be read, is not UTF-8 or not a list, or a value is damaged.
        """
        with text_lines.opened(self._path) as file:
            stream = _Stream(file, self._path)
            if not stream.take("["):
                raise DataError(f"{self._path}: expected a JSON list [ … ], found no '[' first.")
            while not stream.take("]"):
                where = self.place(len(self))
                if len(self) and not stream.take(","):
                    raise DataError(f"{where}: expected a comma before it, found none.")
                start = stream.offset
                value = stream.value(where)
                self._starts.append(start)
                self._sizes.append(stream.offset - start)
                yield where, value
            if not stream.at_end():
                raise DataError(f"{self._path}: expected nothing behind the list, found more.")
        if not self._starts:
            raise DataError(f"{self._path}: expected at least one value in the list, found none.")

    def place(self, index: int) -> str:
        """The name of a value in messages."""
        return f"{self._path}[{index}]"

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        fields.check_index(index, len(self))
        with text_lines.opened(self._path) as file:
            file.seek(self._starts[index])
            content = file.read(self._sizes[index])
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise DataError(
                f"{self.place(index)}: the file has changed since it was read."
            ) from None
        return fields.parse_json(text, self.place(index), " Has the file changed?")


class _Stream:
    """Text of a file from a place on; `offset` is the place in bytes."""

    def __init__(self, file: BinaryIO, path: str | os.PathLike) -> None:
        self._file, self._path = file, path
        start = file.read(4)
        text_lines.check_mark(start, path)
        self.offset = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
        file.seek(self.offset)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._read = self.offset
        self._text, self._at = "", 0

    def take(self, mark: str) -> bool:
        """Whether this character comes next, after white space; it is then passed over."""
        found = not self.at_end() and self._text[self._at] == mark
        if found:
            self._pass(self._at + 1)
        return found

    def at_end(self) -> bool:
        """Passes over white space; whether nothing follows."""
        while True:
            self._pass(_SPACE.match(self._text, self._at).end())
            if self._at < len(self._text):
                return False
            if not self._more(_BLOCK):
                return True

    def value(self, where: str) -> Any:
        """The next value.

        Raises:
          DataError: not JSON, or too long.
        """
        if self.at_end() or self._text[self._at] != "{":
            raise DataError(f"{where}: expected an object {{…}}, found none.")
        while True:
            try:
                _, end = _DECODER.raw_decode(self._text, self._at)
                break
            except RecursionError:
                raise DataError(f"{where}: the JSON is nested too deeply.") from None
            except ValueError as error:
                size = len(self._text) - self._at
                if size > MAX_VALUE or not self._more(max(_BLOCK, size)):
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                    raise DataError(
                        f"{where}: not JSON ({reason}). Is the file complete?"
                    ) from None
        value = fields.parse_json(self._text[self._at : end], where)
        self._pass(end)
        return value

    def _pass(self, end: int) -> None:
        passed = self._text[self._at : end]
        self.offset += len(passed) if passed.isascii() else len(passed.encode())
        self._at = end

    def _more(self, size: int) -> bool:
        """Reads on; False at the end of the file."""
        content = self._file.read(size)
        try:
            text = self._decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            place = self._read + error.start
            raise DataError(
                f"{self._path}: expected UTF-8 text, found another byte near byte {place:,}. If "
                "the file is Latin-1 or Windows-1252, save it as UTF-8."
            ) from None
        self._read += len(content)
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(content)
