"""Transforms shared by several systems: records to arrays on the host.

Letters: H W image, S the model's side, T text tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from perception_jax.data import images, records
from perception_jax.data.altered import altered
from perception_jax.data.augment import ImageAugment, crop_window
from perception_jax.data.geometry import Geometry
from perception_jax.data.processors import ImageProcessor, ProcessedImage
from perception_jax.data.tokenization import PaddedTokenizer
from perception_jax.data.views import require_square
from perception_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """Random crop and horizontal flip, which can make a caption wrong ("left of", rendered words).

    Attributes:
      min_area: smallest share of the image's area that a crop keeps, in (0, 1]; 1 for no crop.
        The crop has the image's aspect ratio.
      flip: chance of mirroring left and right.
    """

    min_area: float = 1.0
    flip: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.min_area <= 1 and 0 <= self.flip <= 1):
            raise ConfigError(
                f"augmentation: expected min_area in (0, 1] and flip in [0, 1], found {self}."
            )

    def __call__(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        processor: ImageProcessor,
        rng: np.random.Generator,
    ) -> ProcessedImage:
        """Crops, processes, then mirrors; the geometry covers all three."""
        height, width = image.shape[:2]
        left, top, wide, tall = crop_window(width, height, self.min_area, rng)
        crop = Geometry.identity(width, height).cropped(left, top, wide, tall)
        processed = processor(image[top : top + tall, left : left + wide])
        pixels, geometry = processed.pixels, crop.then(processed.geometry)
        if rng.random() < self.flip:
            pixels, geometry = np.ascontiguousarray(pixels[:, ::-1]), geometry.flipped()
        return ProcessedImage(pixels, geometry)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageTextTransform:
    """An image and one of its captions, for contrastive training and retrieval.

    Gives "image" (uint8[S, S, 3]), "ids" (int32[T]) and "id_mask" (bool[T]); with `altered` also
    "altered_ids" (int32[T]), the caption made false by one word, and "altered" (bool), whether it
    has such a word.

    Attributes:
      caption: "random" draws one of the record's captions each time; "first" is for evaluation.
      weights: of "random": how often the first, second, … caption is drawn, relative to each
        other; () draws all alike. Captions beyond the weights are never drawn.
      augment: crops and mirrors; None for the plain image.
      image_augment: changes the image before that; None leaves it as it is.
      altered: whether there are altered captions.
    """

    processor: ImageProcessor
    tokenizer: PaddedTokenizer
    caption: Literal["random", "first"] = "random"
    weights: tuple[float, ...] = ()
    augment: Augment | None = None
    image_augment: ImageAugment | None = None
    altered: bool = False

    def __post_init__(self) -> None:
        require_square(self.processor)
        if self.weights and not (min(self.weights) >= 0 and self.weights[0] > 0):
            raise ConfigError(
                "caption weights: expected none below 0 and the first above 0, found "
                f"{self.weights}."
            )

    def __call__(self, record: records.Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See the class.

        Raises:
          DataError: the record has no caption, or its image cannot be decoded.
        """
        if not record.captions:
            raise DataError("expected at least one caption, found none.")
        pixels = self._pixels(record, rng)
        caption = record.captions[self._choice(len(record.captions), rng)]
        tokens = self.tokenizer([caption])
        arrays = {"image": pixels, "ids": tokens.ids[0], "id_mask": tokens.mask[0]}
        if not self.altered:
            return arrays
        other = altered(caption, rng)
        other_ids = self.tokenizer([other]).ids[0]
        return arrays | {"altered_ids": other_ids, "altered": np.array(bool(other))}

    def _pixels(
        self, record: records.Record, rng: np.random.Generator
    ) -> UInt8[np.ndarray, "S S 3"]:
        if self.augment is None and self.image_augment is None:
            return self.processor(images.decode_picture(record.image, name=record.id)).pixels
        image = images.decode(record.image, name=record.id)
        if self.image_augment is not None:
            image = self.image_augment(image, rng)
        if self.augment is None:
            return self.processor(image).pixels
        return self.augment(image, self.processor, rng).pixels

    def _choice(self, captions: int, rng: np.random.Generator) -> int:
        if self.caption == "first":
            return 0
        weights = np.asarray(self.weights[:captions] or (1.0,) * captions)
        return int(rng.choice(len(weights), p=weights / weights.sum()))
