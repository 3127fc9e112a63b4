"""The training data of GiVE: rows of planned batches as arrays, in groups of one class.

Letters: S side of the model's image, T text tokens, n objects of a record.
"""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from perception_jax.data import images
from perception_jax.data.altered import claims
from perception_jax.data.augment import ImageAugment
from perception_jax.data.object_index import ObjectIndex, index_objects
from perception_jax.data.planned import BatchPlan, PlannedData, Row
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import ObjectInstruction, Record, Source
from perception_jax.data.skipping import MAX_BAD_FRACTION
from perception_jax.data.tokenization import PaddedTokenizer
from perception_jax.data.views import require_square
from perception_jax.systems.give.sampler import BatchPlanner, GroupConfig

ATTRIBUTES = (
    (
        *("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black"),
        *("grey", "white"),
    ),
    ("tiny", "small", "medium-sized", "large", "huge"),
    ("left", "right"),
    ("top", "bottom"),
)
"""Groups of mutually exclusive words; the first group with a word in a caption is used."""

_INDICES = (
    *("label", "absent_index", "caption_index"),
    *("instruction_index", "absent_instruction_index"),
)
"""Columns of a plan that become arrays of the batch."""
_TEXTS_KEPT = 2**16
_LOGGER = logging.getLogger(__name__)


class TrainingData(PlannedData):
    """Training batches of GiVE from a source of records.

    Attributes:
      index: the objects of the source; the batches' "instruction_index" and
        "absent_instruction_index" point into `index.instructions.strings`.
      tokenizer: of the captions.
      boxed: False where rows have no boxes, since `augment` moves objects.
    """

    def __init__(
        self,
        records: Source,
        config: GroupConfig,
        *,
        processor: ImageProcessor,
        tokenizer: PaddedTokenizer,
        template: str | None = None,
        own_instructions: bool = True,
        hold: bool = False,
        altered: bool = False,
        augment: ImageAugment | None = None,
        max_bad_fraction: float = MAX_BAD_FRACTION,
    ):
        """Indexes the source; see `data.object_index.index_objects` for `template` and
        `own_instructions`, and for what it raises.

        Args:
          hold: process every image once and keep it, for data that fit in memory.
          altered: add captions with one attribute changed (`PlusConfig.altered`).
          augment: see `ObjectRows`.
          max_bad_fraction: of records that may be skipped; see `data.skipping`.
        """
        self.tokenizer = tokenizer
        self.boxed = augment is None or not augment.moves
        self.index: ObjectIndex = index_objects(
            records,
            processor=processor,
            template=template,
            own_instructions=own_instructions,
            max_bad_fraction=max_bad_fraction,
        )
        if self.index.counts.pairs < config.batch_size:
            _LOGGER.warning(
                "%s are fewer than the %d rows of a batch: every batch has some of them more than "
                "once. Lower groups or images.",
                self.index.counts,
                config.batch_size,
            )
        super().__init__(
            records,
            BatchPlanner(self.index, config),
            ObjectRows(
                self.index,
                processor=processor,
                tokenizer=tokenizer,
                altered=altered,
                augment=augment,
            ),
            in_memory=hold,
            max_bad_fraction=max_bad_fraction,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BoxedImage:
    """The model's image of a record, with boxes.

    Attributes:
      boxes: of the record's objects, xyxy pixels of `image`; of area 0 without a box.
      box_mask: True for objects with a box.
    """

    image: UInt8[np.ndarray, "S S 3"]
    boxes: Float32[np.ndarray, "n 4"]
    box_mask: Bool[np.ndarray, " n"]


class ObjectRows:
    """Turns rows of `BatchPlanner` into arrays; a `data.planned.RowTransform`.

    - "image": uint8[S, S, 3], changed by `augment`, mirrored for rows with "flip";
    - "boxes" (float32[1, 4]), "box_mask" (bool[1]): the object's box in the model's image, xyxy;
      without area where there is none, or where `augment` moves objects;
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
        augment: ImageAugment | None = None,
    ) -> None:
        """Raises ConfigError for a processor whose images have many sizes.

        Args:
          augment: changes the image of each row in its own way; None leaves it as it is.
        """
        require_square(processor)
        self._index, self._processor, self._tokenizer = index, processor, tokenizer
        self._altered, self._augment = altered, augment
        self._texts: dict[int, dict[str, np.ndarray]] = {}

    def read(self, record: Record, shape: Hashable) -> BoxedImage:
        """Processes the image of a record.

        Raises:
          DataError: the record has no image, or it cannot be decoded.
        """
        del shape  # always the same
        processed = self._processor(images.decode_picture(record.image, name=record.id))
        given = [one.box or (0.0,) * 4 for one in record.objects]
        boxes = processed.geometry.boxes(np.array(given, np.float64).reshape(-1, 4))
        return BoxedImage(
            image=processed.pixels,
            boxes=np.asarray(processed.geometry.clip(boxes), np.float32),
            box_mask=np.array([one.box is not None for one in record.objects], bool),
        )

    def __call__(self, read: BoxedImage, row: Row) -> dict[str, np.ndarray]:
        """The arrays of a row; deterministic."""
        return {name: values[0] for name, values in self.batch([read], row.plan()).items()}

    def batch(self, read: Sequence[BoxedImage], plan: BatchPlan) -> dict[str, np.ndarray]:
        """The arrays of all rows of a plan, stacked."""
        image, flip = np.array([one.image for one in read]), plan["flip"]
        if self._augment is not None:
            for k, seed in enumerate(plan["augment"].tolist()):
                image[k] = self._augment(image[k], np.random.default_rng(seed))
        # Several times as fast as a reversed slice.
        image[flip] = np.take(image[flip], np.arange(image.shape[2])[::-1], axis=2)
        objects = plan["object"].tolist()
        boxes = np.array([one.boxes[k] for one, k in zip(read, objects, strict=True)])
        box_mask = np.array([one.box_mask[k] for one, k in zip(read, objects, strict=True)])
        mirrored = boxes[flip]
        mirrored[:, [0, 2]] = self._processor.size - mirrored[:, [2, 0]]
        boxes[flip] = mirrored
        if self._augment is not None and self._augment.moves:
            boxes, box_mask = np.zeros_like(boxes), np.zeros_like(box_mask)
        texts = [self._text(caption) for caption in plan["caption_index"].tolist()]
        return {
            "image": image,
            "boxes": boxes[:, None],
            "box_mask": box_mask[:, None],
            "image_index": plan.record.astype(np.int32),
            **{name: plan[name].astype(np.int32) for name in _INDICES},
            **{name: np.array([text[name] for text in texts]) for name in texts[0]},
        }

    def described(self, record: Record, row: Row) -> Record:
        """The record with the row's two instructions: that of the present class with its object as
        target, that of the absent class with None."""
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


def altered(caption: str) -> str:
    """Replaces one attribute word of a caption by another of its group, deterministically; "" if
    there is none: "a small red cat" becomes "a small green cat"."""
    found = claims(caption, ATTRIBUTES)
    if not found:
        return ""
    return found[0].replaced(caption, zlib.crc32(caption.encode()) % len(found[0].others))
