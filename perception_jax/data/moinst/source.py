"""A file of canonical records as a source; see `record` for the format.

Verified absent classes are `Record.absent`; `Record.not_exhaustive` has the classes that are not
annotated completely in the image, and those of objects that `outside` left out. An object's own
instruction is one of `Record.instructions`. Objects have the classes' names and display names (see
`data.sources.names`); `ObjectAnnotation.category_id` is the class id. Sizes are compared with the
image files as `data.sources.sizes` says.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Iterator

from perception_jax.data import records, text_lines
from perception_jax.data.moinst.record import (
    CLASSES_FILE,
    MoinstImage,
    MoinstObject,
    from_json,
    read_classes,
)
from perception_jax.data.sources import fields, names, sizes
from perception_jax.data.sources.fields import Outside
from perception_jax.errors import DataError

_ABSENT = ("neg_class_ids", "nonexhaustive_class_ids")


class MoinstSource:
    """Random access to the records of a file; every line is checked at construction.

    Args:
      path: the JSONL file; `classes.json` next to it, if there is one, names all classes.
      images: the folder that "file" is relative to; None for the JSONL file's own.
      outside: what to do with boxes that leave their image; "clip" also leaves out an object
        whose box has no area.

    Raises:
      DataError: naming file, line and key; also for two records of one image, an id with two names,
        or ids of absent classes without a name.
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
        self._raw, given = {}, self._path.parent / CLASSES_FILE
        if given.is_file():
            self._raw = {one.class_id: one.name for one in read_classes(given)}
        self._lines, seen, absent = text_lines.IndexedLines(self._path), {}, {}
        for line in self._lines.scan():
            where, image = self._parse(line)
            first = seen.setdefault(image.image_id, line.number)
            if first != line.number:
                raise DataError(
                    f"{where}: image_id: {image.image_id!r} is already the image of line {first}."
                )
            self._learn_names(image, where)
            for key in _ABSENT:
                for number in getattr(image, key) or ():
                    absent.setdefault(number, f"{where}: {key}")
        self._names = names.display_names(self._raw)
        if not given.is_file():
            for number, where in absent.items():
                self._names_of((number,), where)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> records.Record:
        fields.check_index(index, len(self))
        return self._record(self._lines[index])

    def __iter__(self) -> Iterator[records.Record]:
        """Yields all records in one pass over the file."""
        return map(self._record, text_lines.lines(self._path))

    def _parse(self, line: text_lines.Line) -> tuple[str, MoinstImage]:
        """File and line, for messages, and what the line says."""
        where = f"{self._path}:{line.number}"
        return where, from_json(fields.parse_json(line.text, where), where)

    def _learn_names(self, image: MoinstImage, where: str) -> None:
        for k, one in enumerate(image.objects):
            first = self._raw.setdefault(one.class_id, one.name)
            known, found = names.words(first), names.words(one.name)
            if known != found:
                raise DataError(
                    f"{where}: objects[{k}]: class_id {one.class_id} is {known!r} elsewhere, here "
                    f"{found!r}. Import the set again."
                )

    def _names_of(self, ids: Iterable[int], where: str) -> tuple[str, ...]:
        for number in ids:
            if number not in self._names:
                raise DataError(
                    f"{where}: class {number} has no name: no object is of it, and "
                    f"{CLASSES_FILE} does not list it. Copy the set's {CLASSES_FILE} next to the "
                    "file."
                )
        return tuple(self._names[number] for number in ids)

    def _record(self, line: text_lines.Line) -> records.Record:
        where, image = self._parse(line)
        size, path = _size(image), self._images / image.file
        placed = [
            (one, _box(one, size, self._outside, f"{where}: objects[{k}]: bbox"))
            for k, one in enumerate(image.objects)
        ]
        frame = None
        if size is not None and any(box is not None for _, box in placed):
            frame = sizes.compare(path, size, where, str(self._path))
        kept = [(one, box) for one, box in placed if box is not None or one.bbox is None]
        objects = [one for one, _ in kept]
        left_out = tuple(self._names[one.class_id] for one, box in placed if (one, box) not in kept)
        negative, not_exhaustive = (
            self._names_of(getattr(image, key) or (), f"{where}: {key}") for key in _ABSENT
        )
        return records.Record(
            id=str(image.image_id),
            images=(path,),
            size=size if frame is None else frame.size,
            image_id=image.image_id,
            objects=tuple(self._annotation(one, box, frame) for one, box in kept),
            instructions=tuple(
                records.ObjectInstruction(text=one.instruction, target=k)
                for k, one in enumerate(objects)
                if one.instruction is not None
            ),
            absent=negative,
            not_exhaustive=not_exhaustive + left_out,
        )

    def _annotation(
        self, one: MoinstObject, box: records.Box | None, frame: sizes.Frame | None
    ) -> records.ObjectAnnotation:
        return records.ObjectAnnotation(
            name=self._names[one.class_id],
            raw_name=one.name,
            box=box if box is None or frame is None else frame.box(box),
            captions=one.captions,
            salient=one.salient,
            category_id=one.class_id,
            object_id=one.object_id,
        )


def _size(image: MoinstImage) -> tuple[int, int] | None:
    return None if None in (image.width, image.height) else (image.width, image.height)


def _box(
    one: MoinstObject, size: tuple[int, int] | None, outside: Outside, where: str
) -> records.Box | None:
    if one.bbox is None:
        return None
    x, y, width, height = one.bbox
    return fields.fit_box((x, y, x + width, y + height), size, outside, where)
