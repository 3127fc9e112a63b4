"""A row of a batch as arrays.

Letters: S the model's side, T text tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32

from perception_jax.data import images
from perception_jax.data.processors import ImageProcessor, ProcessedImage
from perception_jax.data.records import Record
from perception_jax.data.tokenization import PaddedTokenizer
from perception_jax.systems.give.data.altered import altered
from perception_jax.systems.give.data.sampler import Row

NUMBERS = {
    "image_index": "image",
    "label": "kind",
    "absent_index": "absent",
    "caption_index": "caption",
    "instruction_index": "instruction",
    "absent_instruction_index": "absent_instruction",
}
"""Batch keys of a row's numbers, and what they are called in its plan."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroupTransform:
    """The arrays of a record of `ClassGroups`.

    - "image": uint8[S, S, 3], mirrored if the row says so;
    - "boxes" (float32[1, 4]), "box_mask" (bool[1]): the object's box in the model's image, xyxy;
      without area where there is none;
    - "ids" (int32[T]), "id_mask" (bool[T]): the caption's tokens;
    - "label", "absent_index": the object's class and one that the image lacks, in
      `ObjectIndex.names`, int32;
    - "image_index", "caption_index": in the source and in `ObjectIndex.captions`, int32;
    - "instruction_index", "absent_instruction_index": in `ObjectIndex.instructions.strings`, int32;
    - with `altered`, "altered_ids", "altered": the caption's tokens with one attribute changed, and
      whether there is such a one.
    """

    processor: ImageProcessor
    tokenizer: PaddedTokenizer
    altered: bool = False

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See the class; nothing is left to chance here.

        Raises:
          ImageError: the image cannot be decoded.
        """
        del rng  # the plan of the batch has decided everything
        row: Row = record.extras["row"]
        shown = self.processor(images.decode(record.image, name=record.id))
        return {
            "image": np.ascontiguousarray(shown.pixels[:, ::-1]) if row.flip else shown.pixels,
            **{key: np.array(getattr(row, name), np.int32) for key, name in NUMBERS.items()},
            "boxes": mirrored(
                model_boxes(record, shown)[[row.object]], self.processor.size, row.flip
            ),
            "box_mask": np.array([record.objects[row.object].box is not None]),
            **{name: rows[0] for name, rows in self.texts([row.text]).items()},
        }

    def texts(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The arrays of captions, one row each."""
        tokens = self.tokenizer(list(captions))
        found = {"ids": tokens.ids, "id_mask": tokens.mask}
        if not self.altered:
            return found
        other = [altered(caption) for caption in captions]
        there = np.array([bool(text) for text in other])
        return found | {"altered_ids": self.tokenizer(other).ids, "altered": there}


def model_boxes(record: Record, shown: ProcessedImage) -> Float32[np.ndarray, "n 4"]:
    """Boxes of a record's objects in the model's image; zeros for those without one."""
    given = [one.box or (0.0,) * 4 for one in record.objects]
    boxes = np.array(given, np.float64).reshape(-1, 4)
    return np.asarray(shown.geometry.clip(shown.geometry.boxes(boxes)), np.float32)


def mirrored(
    boxes: Float32[np.ndarray, "*N 4"], size: int, flip: bool | Bool[np.ndarray, "*N"]
) -> Float32[np.ndarray, "*N 4"]:
    """Boxes after left and right of an image of that size were exchanged, where `flip` is True."""
    other = np.stack(
        [size - boxes[..., 2], boxes[..., 1], size - boxes[..., 0], boxes[..., 3]], axis=-1
    )
    return np.where(np.asarray(flip)[..., None], other, boxes).astype(np.float32)
