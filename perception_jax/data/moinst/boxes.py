"""Boxes for records that have none, out of the annotation file of the set they were made from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

from perception_jax.data.moinst.record import MoinstImage, MoinstObject
from perception_jax.data.sources import fields
from perception_jax.errors import DataError


class SourceBoxes:
    """Boxes and sizes of a COCO or LVIS file, by the ids that records refer to.

    Raises:
      DataError: not such a file.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        content = fields.mapping(fields.read_json(path), str(path))
        self._boxes, self._sizes = {}, {}
        for key in ("images", "annotations"):
            if not isinstance(content.get(key), list):
                raise DataError(
                    f"{path}: expected a COCO or LVIS file with lists 'images' and 'annotations', "
                    f"found the keys {sorted(content)}."
                )
        for entry in content["images"]:
            self._sizes[entry.get("id")] = (entry.get("width"), entry.get("height"))
        for k, entry in enumerate(content["annotations"]):
            box = fields.numbers(4)(entry.get("bbox"), f"{path}: annotations[{k}]: bbox")
            self._boxes[entry.get("id")] = (entry.get("image_id"), entry.get("category_id"), box)

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
