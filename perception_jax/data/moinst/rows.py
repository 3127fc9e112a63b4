"""Rows of the published MOInst files, and of files with the same content under other keys.

A published row has `image_id`, `file_name`, `image_path`, `category_id`, `object_id`, and either
`caption`, a text, or `captions`, a list. Where the keys next to the data are not those, the aliases
of `ALIASES` are looked up in their order.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from perception_jax.data.moinst.tables import CategoryId
from perception_jax.data.sources import fields
from perception_jax.errors import DataError

ALIASES: Mapping[str, tuple[str, ...]] = {
    "file_name": ("file", "image", "img"),
    "category_id": ("category", "class", "object", "label", "name"),
    "instruction": ("prompt", "question"),
    "caption": ("text", "description", "answer", "sentence"),
}
"""Alternative keys of each value of a row."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """One row of a published file; missing values are None or empty.

    Attributes:
      category: a number, or a text that names the class.
      captions: stripped, blank ones left out.
      form: the key that they stand under, "caption" (or an alias) or "captions"; "" if none does.
    """

    image_id: int | str | None
    file_name: str
    image_path: str
    category: CategoryId | None
    object_id: int | str | None
    captions: tuple[str, ...]
    form: str
    instruction: str | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRows:
    """The rows of a published file with its categories and image sizes.

    Attributes:
      rows: in the file's order.
      keys: how many rows have each key.
      samples: the first three rows unchanged.
      categories: the list "categories" next to the rows, or None.
      sizes: width and height by image id, of the list "images" next to the rows.
    """

    rows: tuple[PublishedRow, ...]
    keys: Mapping[str, int]
    samples: tuple[Mapping[str, Any], ...]
    categories: Sequence[Any] | None
    sizes: Mapping[int | str, tuple[int, int]]


def read_rows(path: Any) -> PublishedRows:
    """Finds and reads the rows of a JSON file.

    Raises:
      DataError: not JSON, no list of rows in it, or several.
    """
    content = fields.read_json(path)
    entries = _find_entries(content, str(path))
    beside = content if isinstance(content, Mapping) else {}
    keys = collections.Counter(key for entry in entries for key in entry)
    return PublishedRows(
        rows=tuple(_row(entry) for entry in entries),
        keys=dict(keys.most_common()),
        samples=tuple(entries[:3]),
        categories=fields.optional(_list)(beside.get("categories"), f"{path}: categories"),
        sizes=_sizes(beside.get("images"), f"{path}: images"),
    )


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise fields.fail(where, "a list", value)
    return value


def _find_entries(content: Any, where: str) -> list[Mapping[str, Any]]:
    """The list of rows: the content itself, or the one value of it that has captions."""
    lists = content if isinstance(content, Mapping) else {"": content}
    for captions in (("caption", "captions"), ALIASES["caption"]):
        found = [key for key, value in lists.items() if _has_rows(value, captions)]
        if len(found) > 1:
            raise DataError(
                f"{where}: expected one list of records with captions, found several: "
                f"{', '.join(found)}. Keep one of them in the file."
            )
        if found:
            place = f"{where}: {found[0]}" if found[0] else where
            entries = enumerate(lists[found[0]])
            return [fields.mapping(entry, f"{place}[{k}]") for k, entry in entries]
    keys = (
        f"the keys {fields.keys_of(lists)}" if isinstance(content, Mapping) else "none in the list"
    )
    raise DataError(
        f"{where}: expected a list of records with image_id and caption or captions, at the top or "
        f"under a key; found {keys if content else 'nothing'}."
    )


def _has_rows(value: Any, captions: Sequence[str]) -> bool:
    """Whether it is a list with at least one entry that has an image id and captions."""
    return isinstance(value, list) and any(
        isinstance(entry, Mapping) and "image_id" in entry and any(key in entry for key in captions)
        for entry in value
    )


def _row(entry: Mapping[str, Any]) -> PublishedRow:
    form, texts = _texts(entry)
    instruction = _value(entry, "instruction")
    return PublishedRow(
        image_id=_identity(entry.get("image_id")),
        file_name=_text(_value(entry, "file_name")),
        image_path=_text(entry.get("image_path")),
        category=_identity(_value(entry, "category_id")),
        object_id=_identity(entry.get("object_id")),
        captions=tuple(text for text in map(_text, texts) if text),
        form=form,
        instruction=_text(instruction) or None,
    )


def _value(entry: Mapping[str, Any], key: str) -> Any:
    """The value of a key or the first of its aliases that is there."""
    names = (key, *ALIASES[key])
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _texts(entry: Mapping[str, Any]) -> tuple[str, list[Any]]:
    several = entry.get("captions")
    if several is not None:
        return "captions", several if isinstance(several, list) else [several]
    one = _value(entry, "caption")
    if one is None:
        return "", []
    return "caption", one if isinstance(one, list) else [one]


def _identity(value: Any) -> int | str | None:
    try:
        return fields.integer(value, "")
    except DataError:
        return _text(value) or None


def _text(value: Any) -> str:
    try:
        return fields.any_text(value, "").strip()
    except DataError:
        return ""


def _sizes(entries: Any, where: str) -> dict[int | str, tuple[int, int]]:
    """Width and height by image id, of the entries that have them."""
    sizes = {}
    for k, entry in enumerate(entries if isinstance(entries, list) else ()):
        found = fields.mapping(entry, f"{where}[{k}]")
        number = _identity(found.get("id"))
        if number is not None and None not in (found.get("width"), found.get("height")):
            sizes[number] = tuple(
                fields.side(found[side], f"{where}[{k}]: {side}") for side in ("width", "height")
            )
    return sizes
