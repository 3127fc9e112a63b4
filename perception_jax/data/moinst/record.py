"""The canonical record: one image per JSON line, with captions for each of its objects.

    {"image_id": 391895, "file": "train2017/000000391895.jpg", "width": 640, "height": 360,
     "objects": [{"class": "motorcycle", "class_id": 12, "source_category_id": 703,
                  "object_id": 5521, "captions": ["a red motorcycle on a dirt road"],
                  "instruction": null,            null: made of the class name
                  "bbox": [359.2, 146.2, 112.5, 213.6],          x, y, width, height; may be missing
                  "salient": true}],                                                  may be missing
     "neg_class_ids": [3], "nonexhaustive_class_ids": [7]}                            may be missing

Beside it `classes.json` lists the classes: a list of {"class_id", "source_category_id", "class"},
with "frequency" and "synonyms" where the source has them. `class_id` counts from 0 in the order of
the source's ids; train and test share it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from perception_jax.data.moinst.tables import CategoryId
from perception_jax.data.sources import fields
from perception_jax.errors import DataError
from perception_jax.files import replacing, write_whole

CLASSES_FILE = "classes.json"
"""File name of the class table next to the records."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoinstObject:
    """An object; `name` is the category's, verbatim, `bbox` x, y, width, height in pixels.

    `object_id` is the id of its annotation in the source. `instruction`: None to make it of the
    name. `salient`: whether it is its image's largest; None where nobody said.
    """

    name: str
    class_id: int
    source_category_id: CategoryId | None = None
    object_id: int | None = None
    captions: tuple[str, ...] = ()
    instruction: str | None = None
    bbox: tuple[float, float, float, float] | None = None
    salient: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoinstImage:
    """An image; `file` is relative to the folder of images, `width` and `height` are pixels.

    `neg_class_ids` are verified absent; `nonexhaustive_class_ids` are not annotated completely, so
    nothing follows from their absence. None leaves them out of the file.
    """

    image_id: int | str
    file: str
    width: int | None = None
    height: int | None = None
    objects: tuple[MoinstObject, ...]
    neg_class_ids: tuple[int, ...] | None = None
    nonexhaustive_class_ids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MoinstClass:
    """One line of the class table; `frequency` is LVIS's "r", "c" or "f"."""

    class_id: int
    source_category_id: CategoryId | None = None
    name: str
    frequency: str | None = None
    synonyms: tuple[str, ...] = ()


def to_json(image: MoinstImage) -> dict[str, Any]:
    """The JSON object of a line."""
    objects = [_to_json(one, ("bbox", "salient")) for one in image.objects]
    return _to_json(image, ("neg_class_ids", "nonexhaustive_class_ids")) | {"objects": objects}


def _to_json(one: Any, left_out: Collection[str]) -> dict[str, Any]:
    """The fields of a dataclass without those of `left_out` that are None."""
    entry = {}
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if value is not None or field.name not in left_out:
            key = "class" if field.name == "name" else field.name
            entry[key] = list(value) if isinstance(value, tuple) else value
    return entry


def from_json(value: Any, where: str) -> MoinstImage:
    """A line's JSON object, checked.

    Args:
      where: file and line, for messages.

    Raises:
      DataError: naming the key.
    """
    found = fields.entries(value, where, _IMAGE, required=("image_id", "file", "objects"))
    return MoinstImage(**found)


def read_images(path: str | os.PathLike) -> Iterator[MoinstImage]:
    """The records of a file in its order; blank lines are allowed.

    Raises:
      DataError: naming file, line and key.
    """
    return fields.json_lines(path, from_json)


def write_images(path: pathlib.Path, images: Iterable[MoinstImage]) -> None:
    """Writes a file of records atomically."""
    with replacing(path) as file:
        for image in images:
            file.write(json.dumps(to_json(image), ensure_ascii=False).encode() + b"\n")


def write_classes(path: pathlib.Path, classes: Iterable[MoinstClass]) -> None:
    """Writes a class table."""
    entries = (_to_json(one, ("frequency",)) for one in classes)
    entries = ({key: value for key, value in one.items() if value != []} for one in entries)
    lines = [json.dumps(one, ensure_ascii=False) for one in entries]
    write_whole(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_classes(path: str | os.PathLike) -> tuple[MoinstClass, ...]:
    """A class table, by `class_id`.

    Raises:
      DataError: naming file, entry and key; also unless the ids are 0, 1, 2, ….
    """
    entries = fields.list_of(_class)(fields.read_json(path), str(path))
    if [one.class_id for one in entries] != list(range(len(entries))):
        raise DataError(f"{path}: class_id: expected 0, 1, 2, … in order, found another order.")
    return entries


def _class(value: Any, where: str) -> MoinstClass:
    found = fields.entries(value, where, _CLASS, required=("class_id", "class"))
    return MoinstClass(name=found.pop("class"), **found)


def _object(value: Any, where: str) -> MoinstObject:
    found = fields.entries(value, where, _OBJECT, required=("class", "class_id"))
    return MoinstObject(name=found.pop("class"), **found)


def _class_id(value: Any, where: str) -> int:
    if fields.integer(value, where) < 0:
        raise fields.fail(where, "0 or more", value)
    return value


_OBJECT: Mapping[str, fields.Check] = {
    "class": fields.text,
    "class_id": _class_id,
    "source_category_id": fields.optional(fields.identity),
    "object_id": fields.optional(fields.integer),
    "captions": fields.list_of(fields.text),
    "instruction": fields.optional(fields.text),
    "bbox": fields.optional(fields.numbers(4)),
    "salient": fields.optional(fields.boolean),
}
_IMAGE: Mapping[str, fields.Check] = {
    "image_id": fields.identity,
    "file": fields.file_name,
    "width": fields.optional(fields.side),
    "height": fields.optional(fields.side),
    "objects": fields.list_of(_object),
    "neg_class_ids": fields.optional(fields.list_of(_class_id)),
    "nonexhaustive_class_ids": fields.optional(fields.list_of(_class_id)),
}
_CLASS: Mapping[str, fields.Check] = {
    "class_id": _class_id,
    "source_category_id": fields.optional(fields.identity),
    "class": fields.text,
    "frequency": fields.optional(fields.text),
    "synonyms": fields.list_of(fields.text),
}
