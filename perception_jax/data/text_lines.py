r"""Text files: one reader for annotation files, captions, names and prompts.

- UTF-8, with or without a byte order mark; other encodings are refused, never guessed.
- A line ends at "\n", "\r\n" or "\r" and nowhere else: U+2028, U+0085 and other separators that
  `str.splitlines` knows are part of a text.
- What stands on a line is found again by the offset of its first byte.
"""

from __future__ import annotations

import array
import codecs
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterator

from perception_jax.errors import DataError

MAX_LINE = 2**26
"""Longest line in bytes; a longer one is an error."""

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One line of a file.

    Attributes:
      number: from 1, blank lines counted.
      offset: of its first byte in the file.
      text: without the line end.
    """

    number: int
    offset: int
    text: str


def read_text(path: str | os.PathLike) -> str:
    """The whole text of a file, line ends as they are.

    Raises:
      DataError: it cannot be read, or is not UTF-8.
    """
    with opened(path) as file:
        try:
            content = file.read()
        except OSError as error:
            raise _unreadable(path, error) from None
    check_mark(content[:4], path)
    return _decoded(content, path, 1)


def lines(path: str | os.PathLike) -> Iterator[Line]:
    """The lines of a file that are not blank, read one after the other.

    Raises:
      DataError: it cannot be read, is not UTF-8 (naming the line), or has a line above `MAX_LINE`.
    """
    with opened(path) as file:
        # Nothing is sought here, so that a pipe can be read too.
        check_mark(_start_of(file, path), path)
        for number, (offset, content) in enumerate(_raw_lines(file, path, 0), 1):
            text = _decoded(content, path, number)
            if text.strip():
                yield Line(number, offset, text)


class IndexedLines:
    """Random access to the lines of a file that are not blank: they are read again on request, so
    that a large file takes little memory."""

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = path
        self._numbers, self._offsets = array.array("q"), array.array("q")

    def scan(self) -> Iterator[Line]:
        """Yields all lines and notes where they are; to be finished before any other access.

        Raises:
          DataError: as `lines`; also if there is none.
        """
        for line in lines(self._path):
            self._numbers.append(line.number)
            self._offsets.append(line.offset)
            yield line
        if not self._numbers:
            raise DataError(f"{self._path}: expected at least one line, found none.")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Line:
        if not 0 <= index < len(self):
            raise IndexError(f"line {index} of {len(self)}")
        number, offset = self._numbers[index], self._offsets[index]
        with opened(self._path) as file:
            file.seek(offset)
            _, content = next(_raw_lines(file, self._path, offset), (offset, b""))
            return Line(number, offset, _decoded(content, self._path, number))


def read_lines(path: pathlib.Path) -> tuple[str, ...]:
    """The different lines of a file in their order, without space around them and without empty
    ones.

    Raises:
      DataError: as `lines`; also if there is none.
    """
    found = tuple(dict.fromkeys(line.text.strip() for line in lines(path)))
    if not found:
        raise DataError(f"{path}: expected one text a line, found none.")
    return found


def opened(path: str | os.PathLike) -> io.BufferedReader:
    """Opens a file of text for reading bytes; raises `DataError` if it cannot be read."""
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, error) from None


def _unreadable(path: str | os.PathLike, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) else error
    return DataError(f"{path}: expected a readable file of text, found: {reason}.")


def _start_of(file: io.BufferedReader, path: str | os.PathLike) -> bytes:
    try:
        return file.peek(4)[:4]
    except OSError as error:
        raise _unreadable(path, error) from None


def _raw_lines(
    file: io.BufferedReader, path: str | os.PathLike, offset: int
) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of each line from here on."""
    while content := file.readline(MAX_LINE + 1):
        if len(content) > MAX_LINE:
            raise DataError(
                f"{path}: expected lines of at most {MAX_LINE:,} bytes, found a longer one at byte "
                f"{offset:,}. Is it a file of lines?"
            )
        start = offset
        for part in content.splitlines(keepends=True):  # of bytes: at "\n", "\r\n" and "\r" alone
            yield start, part.rstrip(b"\r\n")
            start += len(part)
        offset += len(content)


def check_mark(start: bytes, path: str | os.PathLike) -> None:
    """Raises `DataError` if the first bytes of a file are the mark of another encoding."""
    for mark, name in _OTHER_MARKS.items():
        if start.startswith(mark):
            raise DataError(
                f"{path}: expected UTF-8 text, found {name} (it begins with "
                f"{mark.hex(' ').upper()}). Save it as UTF-8."
            )


def _decoded(content: bytes, path: str | os.PathLike, first: int) -> str:
    """Text of the lines from number `first` on, without byte order marks at its start."""
    if b"\0" in content:
        raise DataError(
            f"{path}: expected UTF-8 text, found NUL bytes. If it is UTF-16, save it as UTF-8."
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = first - 1 + len((content[: error.start] + b"x").splitlines())
        raise DataError(
            f"{path}:{number}: expected UTF-8 text, found the byte 0x{content[error.start]:02X} "
            "where none such may be. If the file is Latin-1 or Windows-1252, save it as UTF-8."
        ) from None
    return text.lstrip("\ufeff")  # also inside a file: joined files have one at each start
