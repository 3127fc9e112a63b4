"""Adds boxes to records without any, from the annotation file of the original dataset."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from perception_jax.data.moinst.record import MoinstImage, MoinstObject
from perception_jax.data.sources import fields
from perception_jax.data.sources.coco import read_tables
from perception_jax.errors import DataError


class SourceBoxes:
    """Boxes and sizes of a COCO or LVIS file, by the ids that records refer to.

    Raises:
      DataError: not such a file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        content = read_tables(path)
        self._boxes, self._sizes = {}, {}
        for k, entry in enumerate(content["images"]):
            where = f"{path}: images[{k}]"
            image_id, *size = fields.values(
                entry, where, id=fields.identity, width=fields.side, height=fields.side
            )
            self._sizes[image_id] = tuple(size)
        for k, entry in enumerate(content["annotations"]):
            where = f"{path}: annotations[{k}]"
            own, *known = fields.values(
                entry,
                where,
                id=fields.identity,
                image_id=fields.identity,
                category_id=fields.identity,
                bbox=fields.numbers(4),
            )
            if own in self._boxes:
                raise DataError(f"{where}: id: {own!r} is also that of another annotation.")
            self._boxes[own] = known

    def fill(self, images: Iterable[MoinstImage]) -> tuple[tuple[MoinstImage, ...], int]:
        """Records with sizes and boxes where they had none, and how many boxes were found.

        A box is taken if the annotation with the object's id is of the same image and category.
        """
        filled, count = [], 0
        for image in images:
            objects = tuple(self._filled(image, one) for one in image.objects)
            count += sum(
                new.bbox is not None and old.bbox is None
                for new, old in zip(objects, image.objects, strict=True)
            )
            filled.append(dataclasses.replace(image, objects=objects, **self._size(image)))
        return tuple(filled), count

    def _filled(self, image: MoinstImage, one: MoinstObject) -> MoinstObject:
        image_id, category, box = self._boxes.get(one.object_id, (None, None, None))
        same = image_id == image.image_id and category == one.source_category_id
        if one.bbox is not None or box is None or not same:
            return one
        return dataclasses.replace(one, bbox=box)

    def _size(self, image: MoinstImage) -> Mapping[str, Any]:
        if None not in (image.width, image.height) or image.image_id not in self._sizes:
            return {}
        width, height = self._sizes[image.image_id]
        return {"width": width, "height": height}
