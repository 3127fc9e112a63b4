"""Import of the published MOInst JSON: rows of captions become one canonical record per image.

Strict: rows without an image, a class or a caption are dropped and counted up to 1 % of a file, and
more of any one kind stops the import. What is known of the files is in `rows`.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from perception_jax.data.moinst import tables
from perception_jax.data.moinst.record import MoinstClass, MoinstImage, MoinstObject
from perception_jax.data.moinst.rows import PublishedRow, PublishedRows, read_rows
from perception_jax.data.moinst.tables import Category, CategoryId, Table
from perception_jax.errors import DataError

MAX_BAD_SHARE = 0.01
"""Share of unusable rows of a file, per kind of fault, above which the import fails."""
EXPECTED = {"images": 80_000, "annotations": 240_000, "classes": 264}
"""Approximate totals of the complete dataset, from a summary of the paper."""
EXPECTED_WITHIN = 0.05
"""Relative deviation from `EXPECTED` above which a warning is given."""
FOLDERS = ("train2017", "val2017", "train2014", "val2014")
"""COCO's image folders, in the order in which a bare file name is searched."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """The records of each file ("train", "test") and what there was to count.

    Attributes:
      classes: of all files together, by class id.
      report: counts by file and of the total ("annotations": objects after merging).
      table: where the class names are from.
      shares: of `tables.detect`, if it was asked.
      rows: what was read, by file.
    """

    images: Mapping[str, tuple[MoinstImage, ...]]
    classes: tuple[MoinstClass, ...]
    report: Mapping[str, Mapping[str, int]]
    table: str
    shares: Mapping[str, float]
    rows: Mapping[str, PublishedRows]

    def warnings(self) -> list[str]:
        """Totals that are far from what the whole set holds, and images in both files."""
        total = self.report["total"]
        found = [
            f"{total[kind]:,} {kind}, expected about {count:,} for the whole of MOInst"
            for kind, count in EXPECTED.items()
            if abs(total[kind] - count) > EXPECTED_WITHIN * count
        ]
        shared = sum(map(len, self.images.values())) - total["images"]
        return [*found, f"{shared:,} images are in train and in test"] if shared else found


def import_published(
    train: str | os.PathLike,
    test: str | os.PathLike | None = None,
    *,
    categories: str = "auto",
    images: str | os.PathLike | None = None,
    exclude: Collection[int | str] = (),
    max_bad_share: float = MAX_BAD_SHARE,
) -> Imported:
    """Imports one file, or train and test together.

    Args:
      train, test: JSON files; see `rows`.
      categories: "auto" takes the table next to the rows, else the bundled one that fits the
        captions; or the name of a bundled table; or a file (`tables.read_categories`).
      images: the folder under which the images are looked up; None looks up nothing.
      exclude: image ids that are left out of train and counted, e.g. those of an evaluation.
      max_bad_share: of a file's rows that may lack an image, a class or a caption each.

    Raises:
      DataError: a file that is none, no table that fits, or too many rows that cannot be used.
    """
    paths = {"train": train} if test is None else {"train": train, "test": test}
    rows = {name: read_rows(path) for name, path in paths.items()}
    name, table, shares = _choose_table(rows, categories)
    locate = _Locator(None if images is None else pathlib.Path(images))
    sound, report = {}, {}
    for part, found in rows.items():
        where = str(paths[part])
        placed, counts = _sound_rows(found.rows, table, locate, where, max_bad_share)
        if part == "train" and exclude:
            shared = {one.row.image_id for one in placed} & set(exclude)
            counts["images_excluded"] = len(shared)
            placed = [one for one in placed if one.row.image_id not in shared]
        sound[part], report[part] = placed, counts
    present = {one.category.id for placed in sound.values() for one in placed}
    ids = {number: k for k, number in enumerate(sorted(present, key=_order))}
    merged = {part: _merge(placed, ids, rows[part].sizes) for part, placed in sound.items()}
    for part, made in merged.items():
        report[part] |= _counts(made)
    classes = tuple(
        MoinstClass(class_id=k, source_category_id=number, name=table[number].name)
        for number, k in ids.items()
    )
    return Imported(
        images=merged,
        classes=classes,
        report={**report, "total": _total(report, merged, classes)},
        table=name,
        shares=shares,
        rows=rows,
    )


def _order(number: CategoryId) -> tuple[bool, CategoryId]:
    return isinstance(number, str), number


# --- Classes ------------------------------------------------------------------------------------


def _choose_table(
    rows: Mapping[str, PublishedRows], categories: str
) -> tuple[str, Table, Mapping[str, float]]:
    """Name, table, and the shares if it was found by them."""
    shares: Mapping[str, float] = {}
    every = [row for found in rows.values() for row in found.rows if row.category is not None]
    if categories in tables.BUNDLED:
        name, table = categories, tables.bundled(categories)
    elif categories != "auto":
        if not pathlib.Path(categories).is_file():
            raise DataError(
                f"categories: expected auto, {', '.join(tables.BUNDLED)} or a JSON file; found "
                f"no file {categories!r}."
            )
        name, table = categories, tables.read_categories(categories)
    elif beside := _tables_beside(rows):
        name, table = "next to the records", beside
    elif all(isinstance(row.category, str) for row in every):
        name, table = "the records' own names", {}
    else:
        name, shares = tables.detect([(row.category, row.captions) for row in every])
        table = tables.bundled(name)
    # Rows may also name their class: one of the known names, or any if none is known.
    known = {one.name: one for one in table.values()}
    texts = {row.category for row in every if isinstance(row.category, str)}
    if known:
        named = {text: known[text] for text in texts if text in known}
    else:
        named = {text: Category(id=text, name=text) for text in texts}
    return name, {**table, **named}, shares


def _tables_beside(rows: Mapping[str, PublishedRows]) -> dict[CategoryId, Category]:
    """The categories in the files themselves, which must agree."""
    table: dict[CategoryId, Category] = {}
    for part, found in rows.items():
        if found.categories is None:
            continue
        for number, category in tables.parse_categories(
            found.categories, f"{part}: categories"
        ).items():
            if table.setdefault(number, category).name != category.name:
                raise DataError(
                    f"{part}: categories: id {number} is {category.name!r} here and "
                    f"{table[number].name!r} in the other file. Give one file of categories."
                )
    return table


# --- Rows that can be used ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Placed:
    """A row with its class and its image file."""

    row: PublishedRow
    category: Category
    file: str


class _Locator:
    """Finds the image file of a row, relative to the root; each path is looked up once."""

    def __init__(self, root: pathlib.Path | None) -> None:
        self._root = root
        self._known: dict[tuple[str, str], str | None] = {}

    def __call__(self, row: PublishedRow) -> str | None:
        key = row.image_path, row.file_name
        if key not in self._known:
            self._known[key] = self._look_up(*key)
        return self._known[key]

    def _look_up(self, image_path: str, file_name: str) -> str | None:
        path, name = _parts(image_path), _parts(file_name)
        if self._root is None:
            return "/".join(path[-2:] or name) or None
        places = [path, path[-2:], name, *([folder, *name[-1:]] for folder in FOLDERS if name)]
        for place in places:
            if place and ".." not in place and os.path.isfile(self._root.joinpath(*place)):
                return "/".join(place)
        return None


def _parts(path: str) -> list[str]:
    """A path's parts, those of absolute and of Windows paths included."""
    return [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]


def _sound_rows(
    rows: Sequence[PublishedRow], table: Table, locate: _Locator, where: str, max_bad_share: float
) -> tuple[list[_Placed], dict[str, int]]:
    """The rows that can be used, and counts.

    Raises:
      DataError: too many of one kind cannot.
    """
    lacking: collections.Counter[str] = collections.Counter()
    sound, categories = [], {}
    for row in rows:
        file = None if row.image_id is None else locate(row)
        category = None if row.category is None else table.get(row.category)
        if category is not None and row.object_id is not None:
            # An object of two classes has none that can be relied on.
            first = categories.setdefault((row.image_id, row.object_id), category)
            category = category if first == category else None
        lacks = {"image": file is None, "class": category is None, "caption": not row.captions}
        lacking.update(kind for kind, missing in lacks.items() if missing)
        if not any(lacks.values()):
            sound.append(_Placed(row, category, file))
    _check_shares(lacking, len(rows), where, max_bad_share)
    forms = collections.Counter(row.form for row in rows)
    return sound, {
        "rows": len(rows),
        "rows_caption": forms["caption"],
        "rows_captions": forms["captions"],
        "rows_dropped": len(rows) - len(sound),
    }


_MEANING = {
    "image": "no image_id, no file name, or no such file under the folder of images",
    "class": "a category_id that is missing, not in the table, or not the object's first one",
    "caption": "none that is not blank",
}


def _check_shares(lacking: Mapping[str, int], count: int, where: str, limit: float) -> None:
    too_many = [kind for kind in _MEANING if lacking[kind] > limit * count]
    if too_many:
        found = "; ".join(
            f"{lacking[kind]} of {count} rows lack {kind} ({_MEANING[kind]})" for kind in too_many
        )
        raise DataError(
            f"{where}: expected image, class and caption in all but {limit:.0%} of the "
            f"rows; found that {found}. Repair the file, or check the table of categories and the "
            "folder of images."
        )


# --- Records ------------------------------------------------------------------------------------


def _merge(
    placed: Sequence[_Placed],
    ids: Mapping[CategoryId, int],
    sizes: Mapping[int | str, tuple[int, int]],
) -> tuple[MoinstImage, ...]:
    """One record per image; images, objects and captions in order of first appearance."""
    by_image: dict[int | str, list[_Placed]] = {}
    for one in placed:
        by_image.setdefault(one.row.image_id, []).append(one)
    merged = []
    for image_id, rows in by_image.items():
        width, height = sizes.get(image_id, (None, None))
        merged.append(
            MoinstImage(
                image_id=image_id,
                file=rows[0].file,
                width=width,
                height=height,
                objects=tuple(_objects(rows, ids)),
            )
        )
    return tuple(merged)


def _objects(rows: Sequence[_Placed], ids: Mapping[CategoryId, int]) -> Iterator[MoinstObject]:
    by_object: dict[Any, list[_Placed]] = {}
    for number, one in enumerate(rows):
        unnamed = ("row", number)
        key = unnamed if one.row.object_id is None else one.row.object_id
        by_object.setdefault(key, []).append(one)
    for group in by_object.values():
        captions = dict.fromkeys(text for one in group for text in one.row.captions)
        category, object_id = group[0].category, group[0].row.object_id
        yield MoinstObject(
            name=category.name,
            class_id=ids[category.id],
            source_category_id=category.id,
            object_id=object_id if isinstance(object_id, int) else None,
            captions=tuple(captions),
            instruction=next((one.row.instruction for one in group if one.row.instruction), None),
        )


def _counts(images: Sequence[MoinstImage]) -> dict[str, int]:
    return {
        "images": len(images),
        "annotations": sum(len(image.objects) for image in images),
        "classes": len({one.class_id for image in images for one in image.objects}),
    }


def _total(
    report: Mapping[str, Mapping[str, int]],
    images: Mapping[str, Sequence[MoinstImage]],
    classes: Sequence[MoinstClass],
) -> dict[str, int]:
    return {
        "rows": sum(counts["rows"] for counts in report.values()),
        "images": len({image.image_id for part in images.values() for image in part}),
        "annotations": sum(counts["annotations"] for counts in report.values()),
        "classes": len(classes),
    }
