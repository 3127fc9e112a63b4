"""A row of a batch as arrays.

Letters: S the model's side, T text tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from perception_jax.data import images
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record
from perception_jax.data.siglip_tokenizer import SiglipTokenizer
from perception_jax.data.tokenizers import ClipTokenizer
from perception_jax.systems.give.sampler import Row

Tokenizer = ClipTokenizer | SiglipTokenizer

NUMBERS = ("image", "kind", "absent", "caption", "instruction", "absent_instruction")
"""Of a row, as they are in its plan."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GroupTransform:
    """The arrays of a record of `ClassGroups`.

    - "pixels": uint8[S, S, 3], mirrored if the row says so;
    - "image", "kind", "absent", "caption": numbers of the row, int32; equal ones mean the same;
    - "ids" (int32[T]), "mask" (bool[T]): the caption's tokens;
    - "instruction", "absent_instruction": places in `ObjectIndex.instructions.strings`, int32.
    """

    processor: ImageProcessor
    tokenizer: Tokenizer

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See the class; nothing is left to chance here.

        Raises:
          ImageError: the image cannot be decoded.
        """
        del rng  # the plan of the batch has decided everything
        row: Row = record.extras["row"]
        pixels = self.processor(images.decode(record.image, name=record.id)).pixels
        tokens = self.tokenizer([row.text])
        return {
            "pixels": np.ascontiguousarray(pixels[:, ::-1]) if row.flip else pixels,
            **{name: np.array(getattr(row, name), np.int32) for name in NUMBERS},
            "ids": tokens.ids[0],
            "mask": tokens.mask[0],
        }
