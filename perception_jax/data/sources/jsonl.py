"""JSON lines beside image files: this library's own annotation format.

One image per line; only "image" is required:

    {"image": "photos/1.jpg",              path, relative to the file (or to `images`)
     "id": "1", "width": 640, "height": 480,
     "caption": "two dogs",                or "captions": ["two dogs", "dogs at play"]
     "objects": [{"name": "dog", "box": [x1, y1, x2, y2],        pixels of the image as shown
                  "caption": "a brown dog", "attributes": {"colour": "brown"},
                  "category_id": 18, "object_id": 7, "area": 812.5, "crowd": false}],
     "referring": [{"text": "the dog on the left", "target": 0}],           index of an object
     "questions": [{"text": "How many dogs?", "answer": "2", "options": ["1", "2"],
                    "kind": "count"}],
     "instructions": [{"text": "Look at the cat.", "target": null}],        null: it is absent
     "absent": ["cat"],
     "extras": {"source": "mine"}}

Names of classes are kept as they stand beside display names (see `names`). "width" and "height" are
compared with the image file when a record with boxes is read; boxes of a file's stored pixels are
turned as its EXIF orientation turns the picture (see `sizes`).
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from perception_jax.data import images as image_files
from perception_jax.data import records, text_lines
from perception_jax.data.sources import fields, names, sizes
from perception_jax.data.sources.fields import Outside
from perception_jax.errors import DataError


class JsonlSource:
    """Random access to a JSONL file (see the module); every line is checked at construction.

    Lines are read again when asked for, so a large file takes little memory. Boxes of lines without
    "width" and "height" are compared with the image's header then.

    Args:
      path: the file; blank lines are allowed.
      images: the folder that "image" is relative to; None for the file's own.
      outside: what to do with boxes that leave their image.

    Raises:
      DataError: naming file, line and key; also for two records with one id.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        images: str | os.PathLike | None = None,
        outside: Outside = "error",
    ) -> None:
        self._path = pathlib.Path(path)
        self._images = self._path.parent if images is None else pathlib.Path(images)
        self._outside = outside
        if not self._path.is_file():
            raise DataError(f"{path}: expected a JSONL file, found no such file.")
        self._names: dict[str, str] = {}
        offsets, lines, seen, raw = [], [], {}, set()
        for line in text_lines.lines(self._path):
            offsets.append(line.offset)
            lines.append(line.number)
            record = self._parse(line.text, line.number, read_image=False)
            self._check_unique(record.id, line.number, seen)
            raw.update(one.raw_name for one in record.objects)
            raw.update(record.absent)  # as they stand, while display names are not known
        self._names = names.display_names_of(raw)
        if not offsets:
            raise DataError(f"{path}: expected at least one line, found none.")
        self._offsets = np.array(offsets, np.int64)
        self._lines = np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> records.Record:
        fields.check_index(index, len(self))
        number = int(self._lines[index])
        line = text_lines.line_at(self._path, int(self._offsets[index]), number)
        return self._parse(line, number, read_image=True)

    def _check_unique(self, name: str, number: int, seen: dict[str, int]) -> None:
        first = seen.setdefault(name, number)
        if first != number:
            raise DataError(
                f"{self._path}:{number}: id: {name!r} is already the id of line {first}."
            )

    def _parse(self, line: str, number: int, *, read_image: bool) -> records.Record:
        where = f"{self._path}:{number}"
        content = fields.parse_json(line, where)
        known = fields.entries(content, where, _RECORD, required=("image",))
        if "caption" in known and "captions" in known:
            raise DataError(f'{where}: expected "caption" or "captions", found both.')
        if ("width" in known) != ("height" in known):
            raise DataError(f'{where}: expected "width" and "height" or neither, found one.')
        path = self._images / known["image"]
        objects, kept = self._objects(known, path if read_image else None, where)
        captions = (known["caption"],) if "caption" in known else known.get("captions", ())
        return records.Record(
            id=known.get("id", f"{self._path.name}:{number}"),
            image=path,
            captions=captions,
            objects=objects,
            referring=_targeted(records.ReferringExpression, known, "referring", kept, where),
            questions=known.get("questions", ()),
            instructions=_targeted(records.Instruction, known, "instructions", kept, where),
            absent=tuple(self._display(name) for name in known.get("absent", ())),
            extras=known.get("extras", {}),
        )

    def _display(self, name: str) -> str:
        return self._names.get(name, name)

    def _objects(
        self, known: Mapping[str, Any], image: pathlib.Path | None, where: str
    ) -> tuple[tuple[records.ObjectAnnotation, ...], dict[int, int]]:
        """The objects, and where each one of the file went (those left out are missing).

        Args:
          image: to compare sizes with; None takes what the line says.
        """
        entries = known.get("objects", ())
        size, frame = (known["width"], known["height"]) if "width" in known else None, None
        if entries and image is not None:
            if size is None:
                size = image_files.read_size(image)
            else:
                frame = sizes.compare(image, size, where, str(self._path))
        objects, kept = [], {}
        for k, entry in enumerate(entries):
            box = fields.fit_box(entry["box"], size, self._outside, f"{where}: objects[{k}]: box")
            if box is not None:
                kept[k], raw = len(objects), entry["name"]
                placed = box if frame is None else frame.box(box)
                more = {"name": self._display(raw), "raw_name": raw, "box": placed}
                objects.append(records.ObjectAnnotation(**{**entry, **more}))
        return tuple(objects), kept


def _targeted(
    kind: type, known: Mapping[str, Any], key: str, kept: Mapping[int, int], where: str
) -> tuple[Any, ...]:
    """Entries of `key` with their targets renumbered; those whose object was left out go too."""
    count, result = len(known.get("objects", ())), []
    for k, entry in enumerate(known.get(key, ())):
        target = entry["target"]
        if target is None:
            result.append(kind(**entry))
        elif not 0 <= target < count:
            raise fields.fail(
                f"{where}: {key}[{k}]: target", f"an index below the {count} objects", target
            )
        elif target in kept:
            result.append(kind(**{**entry, "target": kept[target]}))
    return tuple(result)


def _entry(known: Mapping[str, fields.Check], *required: str) -> fields.Check:
    return functools.partial(fields.entries, known=known, required=required)


def _question(value: Any, where: str) -> records.Question:
    known = {
        "text": fields.text,
        "answer": fields.any_text,
        "options": fields.list_of(fields.any_text),
        "kind": fields.any_text,
    }
    return records.Question(**fields.entries(value, where, known, ("text", "answer")))


_OBJECT = {
    "name": fields.text,
    "box": fields.numbers(4),
    "caption": fields.any_text,
    "attributes": fields.text_mapping,
    "category_id": fields.integer,
    "object_id": fields.identity,
    "area": fields.area,
    "crowd": fields.boolean,
}
_REFERRING = {"text": fields.text, "target": fields.integer}
_INSTRUCTION = {"text": fields.text, "target": fields.optional(fields.integer)}
_RECORD = {
    "image": fields.file_name,
    "id": fields.text,
    "width": fields.side,
    "height": fields.side,
    "caption": fields.text,
    "captions": fields.list_of(fields.text),
    "objects": fields.list_of(_entry(_OBJECT, "name", "box")),
    "referring": fields.list_of(_entry(_REFERRING, "text", "target")),
    "questions": fields.list_of(_question),
    "instructions": fields.list_of(_entry(_INSTRUCTION, "text", "target")),
    "absent": fields.list_of(fields.text),
    "extras": fields.plain_mapping,
}
