"""COCO and LVIS annotation files next to image files, and files like them.

- Boxes are "bbox" = [x, y, width, height] in pixels; segmentations and keypoints are not read. An
  annotation with "bbox" is an object, its "caption" a sentence about that object (Visual Genome,
  RefCOCO-g); one with "caption" alone is a sentence about its image (COCO captions), as is a
  "caption" in "images" (MDETR, GLIP).
- Images are numbered or named: ids are whole numbers or texts.
- Classes keep their own names (`ObjectAnnotation.raw_name`) next to display names (see `names`).
- LVIS is federated: a class is known to be absent only from images that list it in
  "neg_category_ids"; those become `Record.absent`, and "not_exhaustive_category_ids" become
  `Record.not_exhaustive`.
- Sizes are compared with the image files of records with boxes (see `sizes`); only such a record
  has `Record.size`.
"""

from __future__ import annotations

import collections
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perception_jax.data import records
from perception_jax.data.sources import fields, names, sizes
from perception_jax.data.sources.fields import Outside
from perception_jax.errors import DataError
from perception_jax.settings import shown

_LOGGER = logging.getLogger(__name__)
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")
_NO_ID = np.iinfo(np.int64).min
_OBJECT = np.dtype(
    [("row", "i8"), ("box", "f8", 4), ("area", "f8"), ("category", "i8"), ("crowd", "?")]
)
"""An object: the row of its image, its box, its area or NaN, its category id."""
_PROBES = 8


class CocoSource:
    """One record per image, those without annotations included, in the file's order.

    Args:
      path: a JSON file with "images" and "annotations", and "categories" if it has classes.
      images: the folder of the image files; None searches next to the JSON file.
      captions: a captions JSON for the same images, to add to the boxes of `path`.
      outside: what to do with boxes that leave their image or have no area (COCO has some).

    Raises:
      DataError: naming file, entry and key; or that no image file is where it should be.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        images: str | os.PathLike | None = None,
        captions: str | os.PathLike | None = None,
        outside: Outside = "error",
    ) -> None:
        self._path = pathlib.Path(path)
        content = read_tables(self._path)
        self._categories = _Categories(content.get("categories", []), self._path)
        self._images = _Images(content["images"], self._categories, self._path)
        found = _Annotations(self._images, self._categories, outside)
        found.add(content["annotations"], self._path)
        if captions is not None:
            found.add(read_tables(captions)["annotations"], captions, boxes=False)
        self._captions = found.captions
        self._objects = _Objects(found, len(self._images.ids))
        self._root = _find_images(self._path, images, self._images.files)

    def __len__(self) -> int:
        return len(self._images.ids)

    def __getitem__(self, index: int) -> records.Record:
        fields.check_index(index, len(self))
        image_id, names_of = self._images.ids[index], self._categories.display
        image = self._root.of(self._images.files[index])
        objects, size = (), None
        if self._objects.count(index):
            annotated = tuple(self._images.sizes[index].tolist())
            where = f"{self._path}: images[{index}]"
            frame = sizes.compare(image, annotated, where, str(self._path))
            objects = self._objects.of(index, self._categories, frame)
            size = frame.size
        negative, not_exhaustive = self._images.federated[index]
        return records.Record(
            id=str(image_id),
            images=(image,),
            size=size,
            image_id=image_id,
            captions=self._images.captions[index] + self._captions.get(index, ()),
            objects=objects,
            absent=tuple(names_of[k] for k in negative),
            not_exhaustive=tuple(names_of[k] for k in not_exhaustive),
        )


def read_tables(path: str | os.PathLike) -> Mapping[str, Any]:
    """The content of a COCO or LVIS file, whose tables are lists.

    Raises:
      DataError: not such a file.
    """
    content = fields.mapping(fields.read_json(path), str(path))
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{path}: expected a COCO or LVIS file with lists 'images' and 'annotations', "
                f"found the keys {fields.keys_of(content)}. A file of another kind is opened with "
                "`kind`; see perception_jax.data.sources."
            )
    if not isinstance(content.get("categories", []), list):
        raise fields.fail(f"{path}: categories", "a list", content["categories"])
    return content


class _Categories:
    """Names by category id."""

    def __init__(self, entries: Sequence[Any], path: pathlib.Path) -> None:
        self.raw: dict[int, str] = {}
        first: dict[int, int] = {}
        for k, entry in enumerate(entries):
            where = f"{path}: categories[{k}]"
            name, number = fields.values(entry, where, name=fields.any_text, id=fields.integer)
            if number in first:
                raise DataError(
                    f"{where}: id: expected one that no other category has, found {number}, the "
                    f"id of categories[{first[number]}] ({self.raw[number]!r})."
                )
            first[number] = k
            self.raw[number] = name
        self.display = names.display_names(self.raw, lambda number: f"category {number}")
        shared = collections.Counter(self.display.values())
        twice = [name for name, count in shared.items() if count > 1]
        if twice:
            _LOGGER.warning(
                "%s: categories: several have one name and are one class by it: %s.",
                path,
                ", ".join(map(repr, twice[:5])) + (", …" if len(twice) > 5 else ""),
            )

    def check(self, number: int, where: str) -> None:
        """Raises `DataError` for an id that is none of the categories'."""
        if number not in self.raw:
            raise fields.fail(where, "an id of the categories", number)


class _Images:
    """The "images" table as columns."""

    def __init__(self, entries: Sequence[Any], categories: _Categories, path: pathlib.Path) -> None:
        self.ids: list[int | str] = []
        self.files: list[tuple[str, ...]] = []
        self.captions: list[tuple[str, ...]] = []
        self.federated: list[tuple[tuple[int, ...], ...]] = []
        sides = []
        for k, entry in enumerate(entries):
            where = f"{path}: images[{k}]"
            image_id, *size = fields.values(
                entry, where, id=fields.identity, width=fields.side, height=fields.side
            )
            self.ids.append(image_id)
            sides.append(size)
            self.files.append(_file_names(entry, where))
            self.captions.append(_image_captions(entry, where))
            self.federated.append(
                tuple(_category_list(entry, key, categories, where) for key in _FEDERATED)
            )
        self.sizes = np.array(sides, np.int64).reshape(-1, 2)
        self.row = {image_id: row for row, image_id in enumerate(self.ids)}
        if not self.ids:
            raise DataError(f"{path}: images: expected at least one, found none.")
        if len(set(map(str, self.ids))) < len(self.ids):
            raise DataError(f"{path}: images: expected unique ids, found some twice.")

    def row_of(self, entry: Any, where: str) -> int:
        """The row of the image that an annotation belongs to."""
        image_id = fields.required(entry, "image_id", fields.identity, where)
        if image_id not in self.row:
            raise fields.fail(f"{where}: image_id", "an id of the images", image_id)
        return self.row[image_id]


class _Annotations:
    """What annotation tables say, in their order.

    Attributes:
      captions: of images, by row.
      objects: see `_OBJECT`; the lists that follow are of the objects too.
    """

    def __init__(self, images: _Images, categories: _Categories, outside: Outside) -> None:
        self._images, self._categories, self._outside = images, categories, outside
        self.captions: dict[int, tuple[str, ...]] = {}
        self.objects: list[tuple[int, records.Box, float, int, bool]] = []
        self.ids: list[int | str | None] = []
        self.texts: list[str] = []

    def add(self, entries: Sequence[Any], path: str | os.PathLike, *, boxes: bool = True) -> None:
        """One table. `boxes`: whether its boxes count; without, all are captions of images."""
        for k, entry in enumerate(entries):
            where = f"{path}: annotations[{k}]"
            row = self._images.row_of(entry, where)
            if boxes and entry.get("bbox") is not None:
                self._add_object(entry, row, where)
            elif boxes and "caption" not in entry:
                raise DataError(
                    f"{where}: expected the key 'bbox' or 'caption', found only "
                    f"{fields.keys_of(entry)}."
                )
            else:
                caption = fields.required(entry, "caption", fields.text, where).strip()
                self.captions[row] = (*self.captions.get(row, ()), caption)

    def _add_object(self, entry: Mapping[str, Any], row: int, where: str) -> None:
        number, text = self._class_of(entry, where), _text_of(entry, where)
        if entry.get("bbox_mode", 1) != 1:  # of detectron2, whose 0 is xyxy
            raise DataError(
                f"{where}: bbox_mode: expected 1, [x, y, width, height], found "
                f"{shown(entry['bbox_mode'])}. Convert the boxes."
            )
        x, y, width, height = fields.numbers(4)(entry["bbox"], f"{where}: bbox")
        size = (int(self._images.sizes[row, 0]), int(self._images.sizes[row, 1]))
        corners = (x, y, x + width, y + height)
        box = fields.fit_box(corners, size, self._outside, f"{where}: bbox")
        area = fields.optional(fields.area)(entry.get("area"), f"{where}: area")
        crowd = fields.boolean(entry.get("iscrowd", 0), f"{where}: iscrowd")
        own_id = fields.optional(fields.identity)(entry.get("id"), f"{where}: id")
        if box is not None:
            self.objects.append((row, box, np.nan if area is None else area, number, crowd))
            self.ids.append(own_id)
            self.texts.append(text)

    def _class_of(self, entry: Mapping[str, Any], where: str) -> int:
        """The category id; `_NO_ID` for a captioned region of a file without categories."""
        if not self._categories.raw and "caption" in entry and "category_id" not in entry:
            return _NO_ID
        number = fields.required(entry, "category_id", fields.integer, where)
        self._categories.check(number, f"{where}: category_id")
        return number


class _Objects:
    """The objects of all images as an array sorted by image: small in memory, quick to pickle."""

    def __init__(self, found: _Annotations, images: int) -> None:
        objects = np.array(found.objects, _OBJECT)
        rows = objects["row"]
        order = np.argsort(rows, kind="stable")
        self._objects = objects[order]
        self._ids = _sorted_ids(found.ids, order)
        self._texts = tuple(found.texts[k] for k in order) if any(found.texts) else None
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=images))])

    def count(self, row: int) -> int:
        """How many objects an image has."""
        return int(self._starts[row + 1] - self._starts[row])

    def of(
        self, row: int, categories: _Categories, frame: sizes.Frame
    ) -> tuple[records.ObjectAnnotation, ...]:
        """The objects of an image."""
        places = range(self._starts[row], self._starts[row + 1])
        return tuple(self._object(k, categories, frame) for k in places)

    def _object(
        self, k: int, categories: _Categories, frame: sizes.Frame
    ) -> records.ObjectAnnotation:
        one, own_id = self._objects[k], self._ids[k]
        number, area = int(one["category"]), float(one["area"])
        text = "" if self._texts is None else self._texts[k]
        return records.ObjectAnnotation(
            name=categories.display.get(number, ""),
            raw_name=categories.raw.get(number, ""),
            box=frame.box(tuple(one["box"].tolist())),
            area=None if np.isnan(area) else area,
            captions=(text,) if text else (),
            category_id=None if number == _NO_ID else number,
            object_id=_plain_id(own_id),
            crowd=bool(one["crowd"]),
        )


def _sorted_ids(
    ids: Sequence[int | str | None], order: np.ndarray
) -> np.ndarray | tuple[int | str | None, ...]:
    if any(isinstance(one, str) for one in ids):
        return tuple(ids[k] for k in order)
    return np.array([_NO_ID if one is None else one for one in ids], np.int64)[order]


def _plain_id(own_id: np.int64 | int | str | None) -> int | str | None:
    if own_id is None or isinstance(own_id, str):
        return own_id
    return None if own_id == _NO_ID else int(own_id)


class _Root:
    """Where the image files are: a folder, and which of an image's file names counts there."""

    def __init__(self, folder: pathlib.Path, form: int) -> None:
        self._folder, self._form = folder, form

    def of(self, file_names: tuple[str, ...]) -> pathlib.Path:
        return self._folder / file_names[min(self._form, len(file_names) - 1)]


def _category_list(
    entry: Mapping[str, Any], key: str, categories: _Categories, where: str
) -> tuple[int, ...]:
    found = fields.list_of(fields.integer)(entry.get(key, []), f"{where}: {key}")
    for number in found:
        categories.check(number, f"{where}: {key}")
    return found


def _file_names(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The names under which an image's file may be found: as given, with its folder, alone."""
    given = ""
    if entry.get("file_name"):
        given = fields.file_name(entry["file_name"], f"{where}: file_name")
    elif entry.get("coco_url"):
        url = fields.file_name(entry["coco_url"], f"{where}: coco_url")
        given = "/".join(url.split("/")[-2:])
    if not given:
        raise DataError(
            f"{where}: expected 'file_name' or 'coco_url', found {fields.keys_of(entry)}."
        )
    given = given.replace("\\", "/")  # as programs on Windows write it
    return given, given.split("/")[-1]


def _image_captions(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Captions that stand in "images": a "caption", or a list of "captions"."""
    found = [_text_of(entry, where)]
    several = entry.get("captions")
    if several is not None:
        found += fields.list_of(fields.any_text)(several, f"{where}: captions")
    return tuple(text.strip() for text in found if text.strip())


def _text_of(entry: Mapping[str, Any], where: str) -> str:
    caption = fields.optional(fields.any_text)(entry.get("caption"), f"{where}: caption")
    return (caption or "").strip()


def _find_images(
    path: pathlib.Path, images: str | os.PathLike | None, files: Sequence[tuple[str, ...]]
) -> _Root:
    """The first folder in which one of a few probed images is found."""
    split = path.stem.split("_")[-1]  # "instances_train2017.json" is next to "train2017/"
    near = (path.parent, path.parent.parent)
    folders = [f / sub for f in near for sub in ("", split, "images")] if images is None else []
    folders += [] if images is None else [pathlib.Path(images), pathlib.Path(images) / split]
    probes = files[:: max(1, len(files) // _PROBES)][:_PROBES]
    for folder in folders:
        for form in range(2):
            root = _Root(folder, form)
            if any(os.path.isfile(root.of(file_names)) for file_names in probes):
                return root
    raise DataError(
        f"{path}: none of {len(probes)} images looked for was found, e.g. {probes[0][0]!r} in "
        f"{', '.join(str(folder) for folder in folders)}. Set their folder with images=FOLDER."
    )
