"""Prompts from a file: one a line, as text or as JSON."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from perception_jax.data import text_lines
from perception_jax.data.sources import fields
from perception_jax.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt.

    Attributes:
      id: unique in its file.
      text: verbatim.
      where: it comes from, for messages.
    """

    id: str
    text: str
    where: str


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Reads a file of prompts; blank lines are left out.

    Args:
      path: `.jsonl` holds an object a line with "prompt" and, where wanted, "id" (otherwise the
        number of the line); any other file one prompt a line.

    Raises:
      DataError: the file cannot be read, is empty, or a line of it is damaged (it is named); two
        prompts have one id.
    """
    is_json = pathlib.Path(path).suffix == ".jsonl"
    found: dict[str, Prompt] = {}
    for line in text_lines.lines(path):
        where = f"{path}:{line.number}"
        name, text = str(line.number), line.text
        if is_json:
            entry = fields.parse_json(line.text, where)
            text = fields.required(entry, "prompt", fields.text, where)
            name = str(fields.identity(entry.get("id", line.number), f"{where}: id"))
        if name in found:
            raise DataError(f"{where}: expected a new id, found {name!r} of {found[name].where}.")
        found[name] = Prompt(id=name, text=text, where=where)
    if not found:
        raise DataError(f"{path}: expected one prompt a line, found none.")
    return list(found.values())
