"""COCO and LVIS annotation files (instances or captions JSON) beside image files.

Boxes are "bbox" = [x, y, width, height] in pixels; segmentations are not read. LVIS is federated: a
class is known to be absent only from images that list it in "neg_category_ids"; those become
`Record.absent`, and "not_exhaustive_category_ids" become `extras["not_exhaustive"]`.
`extras["size"]` is (width, height), so that boxes can be judged without the image.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from perception_jax.data import records
from perception_jax.data.sources import fields
from perception_jax.data.sources.fields import Outside
from perception_jax.errors import DataError


class CocoSource:
    """One record per image, those without annotations included, in the file's order.

    Args:
      path: a JSON file with "images" and "annotations"; with boxes ("categories" too) or captions.
      images: the folder of the image files; None looks beside the JSON file, as COCO lays it out.
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
        content = _read(self._path)
        self._names = _category_names(content.get("categories", []), self._path)
        self._images = _Images(content["images"], self._names, self._path)
        entries = content["annotations"]
        has_captions = bool(entries) and "caption" in entries[0]
        boxed = [] if has_captions else entries
        self._boxes = _Boxes(boxed, self._images, self._names, outside, self._path)
        caption_files = [(self._path, entries)] if has_captions else []
        if captions is not None:
            caption_files.append((pathlib.Path(captions), _read(captions)["annotations"]))
        self._captions = _captions(caption_files, self._images)
        self._root = _find_images(self._path, images, self._images.files)

    def __len__(self) -> int:
        return len(self._images.ids)

    def __getitem__(self, index: int) -> records.Record:
        fields.check_index(index, len(self))
        image_id = self._images.ids[index]
        size = tuple(self._images.sizes[index].tolist())
        extras: dict[str, Any] = {"image_id": image_id, "size": size}
        negative, not_exhaustive = self._images.federated[index]
        if not_exhaustive:
            extras["not_exhaustive"] = tuple(self._names[k] for k in not_exhaustive)
        return records.Record(
            id=str(image_id),
            image=self._root.of(self._images.files[index]),
            captions=self._captions.get(image_id, ()),
            objects=self._boxes.of(index, self._names),
            absent=tuple(self._names[k] for k in negative),
            extras=extras,
        )


_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")


class _Images:
    """The "images" table as columns."""

    def __init__(
        self, entries: Sequence[Mapping[str, Any]], names: Mapping[int, str], path: pathlib.Path
    ) -> None:
        self.ids: list[int] = []
        self.files: list[tuple[str, ...]] = []
        self.federated: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        sizes = []
        for k, entry in enumerate(entries):
            where = f"{path}: images[{k}]"
            self.ids.append(_get(entry, "id", fields.integer, where))
            sizes.append([_get(entry, side, fields.integer, where) for side in ("width", "height")])
            self.files.append(_file_names(entry, where))
            self.federated.append(
                tuple(_category_list(entry, key, names, where) for key in _FEDERATED)
            )
        self.sizes = np.array(sizes, np.int64).reshape(-1, 2)
        self.row = {image_id: row for row, image_id in enumerate(self.ids)}
        if not self.ids:
            raise DataError(f"{path}: images: expected at least one, found none.")
        if len(self.row) < len(self.ids):
            raise DataError(f"{path}: images: expected unique ids, found some twice.")


class _Boxes:
    """The boxes of all images as arrays sorted by image: small in memory, quick to pickle."""

    def __init__(
        self,
        entries: Sequence[Mapping[str, Any]],
        images: _Images,
        names: Mapping[int, str],
        outside: Outside,
        path: pathlib.Path,
    ) -> None:
        rows, boxes, ids = [], [], []
        for k, entry in enumerate(entries):
            where = f"{path}: annotations[{k}]"
            row = _image_row(entry, images, where)
            category = _get(entry, "category_id", fields.integer, where)
            _check_category(category, names, f"{where}: category_id")
            x, y, width, height = _get(entry, "bbox", fields.numbers(4), where)
            size = (int(images.sizes[row, 0]), int(images.sizes[row, 1]))
            corners = (x, y, x + width, y + height)
            box = fields.fit_box(corners, size, outside, f"{where}: bbox")
            if box is not None:
                crowd = fields.boolean(entry.get("iscrowd", 0), f"{where}: iscrowd")
                rows.append(row)
                boxes.append(box)
                ids.append((category, entry.get("id", -1), int(crowd)))
        order = np.argsort(np.array(rows, np.int64), kind="stable")
        self._boxes = np.array(boxes, np.float64).reshape(-1, 4)[order]
        self._ids = np.array(ids, np.int64).reshape(-1, 3)[order]
        counts = np.bincount(np.array(rows, np.int64), minlength=len(images.ids))
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    def of(self, row: int, names: Mapping[int, str]) -> tuple[records.ObjectAnnotation, ...]:
        part = slice(self._starts[row], self._starts[row + 1])
        return tuple(
            records.ObjectAnnotation(
                name=names[category],
                box=tuple(box),
                category_id=category,
                object_id=None if object_id < 0 else object_id,
                crowd=bool(crowd),
            )
            for box, (category, object_id, crowd) in zip(
                self._boxes[part].tolist(), self._ids[part].tolist(), strict=True
            )
        )


class _Root:
    """Where the image files are: a folder, and which of an image's file names counts there."""

    def __init__(self, folder: pathlib.Path, form: int) -> None:
        self._folder, self._form = folder, form

    def of(self, names: tuple[str, ...]) -> pathlib.Path:
        return self._folder / names[min(self._form, len(names) - 1)]


def _get(entry: Mapping[str, Any], key: str, check: fields.Check, where: str) -> Any:
    if key not in fields.mapping(entry, where):
        raise DataError(f"{where}: expected the key {key!r}, found only {sorted(entry)}.")
    return check(entry[key], f"{where}: {key}")


def _read(path: str | os.PathLike) -> Mapping[str, Any]:
    content = fields.mapping(fields.read_json(path), str(path))
    for key in ("images", "annotations"):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{path}: expected a COCO or LVIS file with lists 'images' and 'annotations', "
                f"found the keys {sorted(content)}."
            )
    return content


def _category_names(entries: Iterable[Any], path: pathlib.Path) -> dict[int, str]:
    names = {}
    for k, entry in enumerate(entries):
        where = f"{path}: categories[{k}]"
        name = _get(entry, "name", fields.text, where)
        names[_get(entry, "id", fields.integer, where)] = name.replace("_", " ").lower()
    return names


def _check_category(category: int, names: Mapping[int, str], where: str) -> None:
    if category not in names:
        raise fields.fail(where, "an id of the categories", category)


def _category_list(
    entry: Mapping[str, Any], key: str, names: Mapping[int, str], where: str
) -> tuple[int, ...]:
    found = fields.list_of(fields.integer)(entry.get(key, []), f"{where}: {key}")
    for category in found:
        _check_category(category, names, f"{where}: {key}")
    return found


def _file_names(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The names under which an image's file may be found: as given, with its folder, alone."""
    url = entry.get("coco_url", "")
    given = entry.get("file_name") or "/".join(url.split("/")[-2:])
    if not given:
        raise DataError(f"{where}: expected 'file_name' or 'coco_url', found {sorted(entry)}.")
    return given, given.split("/")[-1]


def _image_row(entry: Mapping[str, Any], images: _Images, where: str) -> int:
    image_id = _get(entry, "image_id", fields.integer, where)
    if image_id not in images.row:
        raise fields.fail(f"{where}: image_id", "an id of the images", image_id)
    return images.row[image_id]


def _captions(
    files: Iterable[tuple[pathlib.Path, Sequence[Mapping[str, Any]]]], images: _Images
) -> dict[int, tuple[str, ...]]:
    found: dict[int, tuple[str, ...]] = {}
    for path, entries in files:
        for k, entry in enumerate(entries):
            where = f"{path}: annotations[{k}]"
            image_id = images.ids[_image_row(entry, images, where)]
            caption = _get(entry, "caption", fields.text, where).strip()
            found[image_id] = (*found.get(image_id, ()), caption)
    return found


def _find_images(
    path: pathlib.Path, images: str | os.PathLike | None, files: Sequence[tuple[str, ...]]
) -> _Root:
    """The first folder in which one of a few probed images is found."""
    split = path.stem.split("_")[-1]  # "instances_train2017.json" lies beside "train2017/"
    near = (path.parent, path.parent.parent)
    folders = [f / sub for f in near for sub in ("", split, "images")] if images is None else []
    folders += [] if images is None else [pathlib.Path(images), pathlib.Path(images) / split]
    probes = files[:: max(1, len(files) // 8)][:8]
    for folder in folders:
        for form in range(2):
            root = _Root(folder, form)
            if any(root.of(names).is_file() for names in probes):
                return root
    raise DataError(
        f"{path}: none of {len(probes)} images looked for was found, e.g. {probes[0][0]!r} in "
        f"{', '.join(str(folder) for folder in folders)}. Say where they are with images=FOLDER."
    )
