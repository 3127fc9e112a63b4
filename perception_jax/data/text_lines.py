"""Lists of texts, one a line: names, captions, prompts."""

from __future__ import annotations

import pathlib

from perception_jax.errors import DataError


def read_lines(path: pathlib.Path) -> tuple[str, ...]:
    """The different lines of a UTF-8 file in their order, without space around them and without
    empty ones.

    Raises:
      DataError: there is no such file, it is no text, or nothing is in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: expected a text file in UTF-8 with one text a line, found: {error}."
        ) from error
    lines = dict.fromkeys(line.strip() for line in text.splitlines())
    lines.pop("", None)
    if not lines:
        raise DataError(f"{path}: expected one text a line, found none.")
    return tuple(lines)
