"""One object a line: the least that instruction-steered training needs of somebody's own images.

    {"image": "photos/1.jpg", "class": "kite", "caption": "a red kite above the trees",
     "box": [x1, y1, x2, y2], "instruction": "the kite"}

"box" (pixels of the image as shown) and "instruction" may be left out. Lines of one image, wherever
they stand, make one record.
"""

from __future__ import annotations

import os
import pathlib
from typing import Any

from perception_jax.data import images as image_files
from perception_jax.data import records, text_lines
from perception_jax.data.sources import fields, names
from perception_jax.errors import DataError

_LINE = {
    "image": fields.file_name,
    "class": fields.text,
    "caption": fields.text,
    "box": fields.numbers(4),
    "instruction": fields.text,
}


class ObjectLines:
    """Random access to the images of such a file; every line is checked at construction.

    Args:
      path: the file; blank lines are allowed.
      images: the folder that "image" is relative to; None for the file's own.

    Raises:
      DataError: naming file, line and key.
    """

    def __init__(self, path: str | os.PathLike, *, images: str | os.PathLike | None = None) -> None:
        self._path = pathlib.Path(path)
        self._images = self._path.parent if images is None else pathlib.Path(images)
        if not self._path.is_file():
            raise DataError(f"{path}: expected a JSONL file of objects, found no such file.")
        self._lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for line in text_lines.lines(self._path):
            content = self._parse(line.text, line.number)
            self._lines.setdefault(content["image"], []).append((line.number, content))
        if not self._lines:
            raise DataError(f"{path}: expected at least one line, found none.")
        self._images_in_order = tuple(self._lines)
        rows = (content for found in self._lines.values() for _, content in found)
        self._names = names.display_names_of({content["class"] for content in rows})

    def __len__(self) -> int:
        return len(self._images_in_order)

    def __getitem__(self, index: int) -> records.Record:
        fields.check_index(index, len(self))
        name = self._images_in_order[index]
        path, rows = self._images / name, self._lines[name]
        boxed = any("box" in content for _, content in rows)
        size = image_files.read_size(path) if boxed else None
        return records.Record(
            id=name,
            images=(path,),
            size=size,
            objects=tuple(self._object(number, content, size) for number, content in rows),
            instructions=tuple(
                records.ObjectInstruction(text=content["instruction"], target=k)
                for k, (_, content) in enumerate(rows)
                if "instruction" in content
            ),
        )

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        where = f"{self._path}:{number}"
        content = fields.parse_json(line, where)
        required = ("image", "class", "caption")
        return dict(fields.entries(content, where, _LINE, required=required))

    def _object(
        self, number: int, content: dict[str, Any], size: tuple[int, int] | None
    ) -> records.ObjectAnnotation:
        box = content.get("box")
        if box is not None:
            where = f"{self._path}:{number}: box"
            box = fields.fit_box(box, size, "error", where)
        raw = content["class"]
        return records.ObjectAnnotation(
            name=self._names[raw], raw_name=raw, box=box, captions=(content["caption"],)
        )
