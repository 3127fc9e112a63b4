"""JSON lines next to image files: this library's own annotation format.

One record per line, usually of one image; it needs "image", "images", "conversation" or "text":

    {"image": "photos/1.jpg",              path, relative to the file (or to `images`);
                                           or "images": ["photos/1.jpg", "photos/2.jpg"]
     "id": "1", "image_id": 1, "width": 640, "height": 480, "class_name": "street",
     "caption": "two dogs",                or "captions": ["two dogs", "dogs at play"]
     "objects": [{"name": "dog", "box": [x1, y1, x2, y2],        pixels of the image as shown
                  "caption": "a brown dog",                      or "captions": [...]
                  "attributes": {"colour": "brown"}, "salient": true,
                  "category_id": 18, "object_id": 7, "area": 812.5, "crowd": false}],
     "referring": [{"text": "the dog on the left", "target": 0}],           index of an object
     "questions": [{"text": "How many dogs?", "answer": "2",     or "answers": ["2", "two"]
                    "options": ["1", "2"], "kind": "count", "question_id": 5}],
     "instructions": [{"text": "Look at the cat.", "target": null}],        null: it is absent
     "conversation": [{"role": "user", "text": "What is this?"},
                      {"role": "assistant", "text": "A dog.", "targets": [0]}],
     "text": "Once upon a time",           a passage, for language models
     "absent": ["cat"], "not_exhaustive": ["dog"],
     "extras": {"source": "mine"}}

Names of classes are kept next to display names (see `names`). "width" and "height" are
compared with the image file when a record with boxes is read; boxes of a file's stored pixels are
turned as its EXIF orientation turns the picture (see `sizes`).
"""

from __future__ import annotations

import functools
import os
import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from perception_jax.data import images as image_files
from perception_jax.data import records, text_lines
from perception_jax.data.sources import fields, names, sizes
from perception_jax.data.sources.fields import Outside
from perception_jax.errors import DataError

CONTENT = frozenset({"image", "images", "conversation", "text"})
"""Keys of which every line has at least one."""


class JsonlSource:
    """Random access to a JSONL file (see the module); every line is checked at construction.

    Boxes of lines without "width" and "height" are compared with the image's header when the
    record is read.

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
        self._lines, seen, raw = text_lines.IndexedLines(self._path), {}, set()
        for line in self._lines.scan():
            record = self._parse(line, read_image=False)
            first = seen.setdefault(record.id, line.number)
            if first != line.number:
                raise DataError(
                    f"{path}:{line.number}: id: {record.id!r} is already the id of line {first}."
                )
            raw.update(one.raw_name for one in record.objects)
            # As they stand, while display names are not known.
            raw.update((*record.absent, *record.not_exhaustive))
            raw.update({record.class_name} - {""})
        self._names = names.display_names_of(raw)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> records.Record:
        fields.check_index(index, len(self))
        return self._parse(self._lines[index], read_image=True)

    def _parse(self, line: text_lines.Line, *, read_image: bool) -> records.Record:
        where = f"{self._path}:{line.number}"
        content = fields.parse_json(line.text, where)
        known = fields.entries(content, where, _RECORD, required=())
        if not known.keys() & CONTENT:
            raise fields.fail_without(where, "image", known)
        if ("width" in known) != ("height" in known):
            raise DataError(f'{where}: expected "width" and "height" or neither, found one.')
        paths = tuple(self._images / name for name in _one_or_several(known, "image", where))
        if "objects" in known and len(paths) != 1:
            raise DataError(f"{where}: objects: expected one image, found {len(paths)}.")
        objects, kept, size = self._objects(
            known, paths[0] if read_image and paths else None, where
        )
        raw = known.get("class_name", "")
        return records.Record(
            id=known.get("id", f"{self._path.name}:{line.number}"),
            images=paths,
            size=size,
            image_id=known.get("image_id"),
            class_name=self._display(raw),
            raw_class_name=raw,
            captions=_one_or_several(known, "caption", where),
            objects=objects,
            referring=_targeted(records.ReferringExpression, known, "referring", kept, where),
            questions=known.get("questions", ()),
            instructions=_targeted(records.ObjectInstruction, known, "instructions", kept, where),
            conversation=_turns(known, kept, where),
            text=known.get("text", ""),
            absent=tuple(map(self._display, known.get("absent", ()))),
            not_exhaustive=tuple(map(self._display, known.get("not_exhaustive", ()))),
            extras=known.get("extras", {}),
        )

    def _display(self, name: str) -> str:
        return self._names.get(name, name)

    def _objects(
        self, known: Mapping[str, Any], image: pathlib.Path | None, where: str
    ) -> tuple[tuple[records.ObjectAnnotation, ...], dict[int, int], tuple[int, int] | None]:
        """The objects, where each one of the file went (those left out are missing), and the size
        of the picture as shown, if the objects needed it.

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
        shown = size if frame is None else frame.size
        return tuple(objects), kept, shown if entries and image is not None else None


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


def _turns(
    known: Mapping[str, Any], kept: Mapping[int, int], where: str
) -> tuple[records.Turn, ...]:
    """The conversation with its targets renumbered."""
    turns = []
    for k, entry in enumerate(known.get("conversation", ())):
        for target in entry.get("targets", ()):
            if target not in kept:
                place = f"{where}: conversation[{k}]: targets"
                raise fields.fail(place, "indices of objects that are not left out", target)
        targets = tuple(kept[target] for target in entry.get("targets", ()))
        turns.append(records.Turn(role=entry["role"], text=entry["text"], targets=targets))
    return tuple(turns)


def _one_or_several(known: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The value of a key or of its plural."""
    if key in known and f"{key}s" in known:
        raise DataError(f'{where}: expected "{key}" or "{key}s", found both.')
    return (known[key],) if key in known else known.get(f"{key}s", ())


def _entry(known: Mapping[str, fields.Check], *required: str) -> fields.Check:
    return functools.partial(fields.entries, known=known, required=required)


def _object(value: Any, where: str) -> dict[str, Any]:
    found = fields.entries(value, where, _OBJECT, ("name", "box"))
    captions = _one_or_several(found, "caption", where)
    found.pop("caption", None)
    return {**found, "captions": tuple(text for text in captions if text)}


def _question(value: Any, where: str) -> records.Question:
    found = fields.entries(value, where, _QUESTION, ("text",))
    answers = _one_or_several(found, "answer", where)
    if not answers:
        raise fields.fail_without(where, "answer", found)
    found.pop("answer", None)
    return records.Question(**{**found, "answers": answers})


def _role(value: Any, where: str) -> records.Role:
    if value not in typing.get_args(records.Role):
        raise fields.fail(where, "one of " + ", ".join(typing.get_args(records.Role)), value)
    return value


_OBJECT = {
    "name": fields.text,
    "box": fields.numbers(4),
    "caption": fields.any_text,
    "captions": fields.list_of(fields.any_text),
    "attributes": fields.text_mapping,
    "category_id": fields.integer,
    "object_id": fields.identity,
    "area": fields.area,
    "salient": fields.optional(fields.boolean),
    "crowd": fields.boolean,
}
_QUESTION = {
    "text": fields.text,
    "answer": fields.any_text,
    "answers": fields.list_of(fields.any_text),
    "options": fields.list_of(fields.any_text),
    "kind": fields.any_text,
    "question_id": fields.identity,
}
_TURN = {"role": _role, "text": fields.any_text, "targets": fields.list_of(fields.integer)}
_REFERRING = {"text": fields.text, "target": fields.integer}
_INSTRUCTION = {"text": fields.text, "target": fields.optional(fields.integer)}
_RECORD = {
    "image": fields.file_name,
    "images": fields.list_of(fields.file_name),
    "id": fields.text,
    "image_id": fields.identity,
    "class_name": fields.text,
    "width": fields.side,
    "height": fields.side,
    "caption": fields.text,
    "captions": fields.list_of(fields.text),
    "objects": fields.list_of(_object),
    "referring": fields.list_of(_entry(_REFERRING, "text", "target")),
    "questions": fields.list_of(_question),
    "instructions": fields.list_of(_entry(_INSTRUCTION, "text", "target")),
    "conversation": fields.list_of(_entry(_TURN, "role", "text")),
    "text": fields.text,
    "absent": fields.list_of(fields.text),
    "not_exhaustive": fields.list_of(fields.text),
    "extras": fields.plain_mapping,
}
