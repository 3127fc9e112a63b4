"""A row of a batch as arrays.

Letters: S the model's side, T text tokens, n objects of a record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from perception_jax.data import images
from perception_jax.data.planned import Row
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import ObjectInstruction, Record
from perception_jax.data.tokenization import PaddedTokenizer
from perception_jax.data.views import require_square
from perception_jax.systems.give.data.altered import altered
from perception_jax.systems.give.data.object_index import ObjectIndex

_INDICES = (
    *("label", "absent_index", "caption_index"),
    *("instruction_index", "absent_instruction_index"),
)
"""Columns of a plan that are arrays of the batch too."""
_TEXTS_KEPT = 2**16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """An image as the model gets it.

    Attributes:
      boxes: of the record's objects, xyxy pixels of `image`; without area where there is none.
      box_mask: which objects have a box.
    """

    image: UInt8[np.ndarray, "S S 3"]
    boxes: Float32[np.ndarray, "n 4"]
    box_mask: Bool[np.ndarray, " n"]


class ObjectRows:
    """The arrays of `BatchPlanner`'s rows; see `data.planned.RowTransform`.

    - "image": uint8[S, S, 3], mirrored if the row says so;
    - "boxes" (float32[1, 4]), "box_mask" (bool[1]): the object's box in the model's image, xyxy;
      without area where there is none;
    - "ids" (int32[T]), "id_mask" (bool[T]): the caption's tokens;
    - "image_index": the record's number, int32; "label" and the other indices of
      `BatchPlanner.plan`, int32;
    - with `altered`, "altered_ids", "altered": the caption's tokens with one attribute changed, and
      whether there is such a one.
    """

    def __init__(
        self,
        index: ObjectIndex,
        *,
        processor: ImageProcessor,
        tokenizer: PaddedTokenizer,
        altered: bool = False,
    ) -> None:
        """Raises ConfigError for a processor whose images have many sizes."""
        require_square(processor)
        self._index, self._processor, self._tokenizer = index, processor, tokenizer
        self._altered = altered
        self._texts: dict[int, dict[str, np.ndarray]] = {}

    def read(self, record: Record, shape: Hashable) -> Shown:
        """The processed image.

        Raises:
          DataError: the record has no image, or it cannot be decoded.
        """
        del shape  # always the same
        processed = self._processor(images.decode(record.image, name=record.id))
        given = [one.box or (0.0,) * 4 for one in record.objects]
        boxes = processed.geometry.boxes(np.array(given, np.float64).reshape(-1, 4))
        return Shown(
            image=processed.pixels,
            boxes=np.asarray(processed.geometry.clip(boxes), np.float32),
            box_mask=np.array([one.box is not None for one in record.objects], bool),
        )

    def __call__(self, read: Shown, row: Row) -> dict[str, np.ndarray]:
        """See the class; nothing is left to chance here."""
        chosen, image = slice(row.values["object"], row.values["object"] + 1), read.image
        boxes = read.boxes[chosen]
        if row.values["flip"]:
            image, boxes = np.ascontiguousarray(image[:, ::-1]), boxes.copy()
            boxes[:, [0, 2]] = self._processor.size - boxes[:, [2, 0]]
        return {
            "image": image,
            "boxes": boxes,
            "box_mask": read.box_mask[chosen],
            "image_index": np.array(row.record, np.int32),
            **{name: np.array(row.values[name], np.int32) for name in _INDICES},
            **self._text(int(row.values["caption_index"])),
        }

    def described(self, record: Record, row: Row) -> Record:
        """With the instructions of the row: the present class's with its object, the absent
        class's with None."""
        strings, values = self._index.instructions.strings, row.values
        present, absent = values["instruction_index"], values["absent_instruction_index"]
        return dataclasses.replace(
            record,
            instructions=(
                ObjectInstruction(text=strings[present], target=int(values["object"])),
                ObjectInstruction(text=strings[absent], target=None),
            ),
        )

    def _text(self, caption: int) -> dict[str, np.ndarray]:
        found = self._texts.get(caption)
        if found is None:
            found = self._tokenise(self._index.captions[caption])
            if len(self._texts) < _TEXTS_KEPT:
                self._texts[caption] = found
        return found

    def _tokenise(self, caption: str) -> dict[str, np.ndarray]:
        tokens = self._tokenizer([caption])
        found = {"ids": tokens.ids[0], "id_mask": tokens.mask[0]}
        if not self._altered:
            return found
        other = altered(caption)
        return found | {
            "altered_ids": self._tokenizer([other]).ids[0],
            "altered": np.array(bool(other)),
        }
