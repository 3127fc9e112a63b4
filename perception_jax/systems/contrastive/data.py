"""The training data of contrastive training: captioned records as batches of arrays."""

from __future__ import annotations

import functools

import grain

from perception_jax.api import Processor
from perception_jax.data.augment import ImageAugment
from perception_jax.data.loader import Examples, RecordExamples, make_loader
from perception_jax.data.records import Source
from perception_jax.data.skipping import MAX_BAD_FRACTION
from perception_jax.data.tokenization import PaddedTokenizer
from perception_jax.data.transforms import Augment, ImageTextTransform


class ContrastiveData:
    """Records with captions, ready to train on."""

    def __init__(
        self,
        source: Source,
        processor: Processor,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        caption_weights: tuple[float, ...] = (),
        min_area: float = 1.0,
        augment: ImageAugment | None = None,
        altered: bool = False,
        max_bad_fraction: float = MAX_BAD_FRACTION,
    ):
        """Opens nothing yet.

        Args:
          batch_size: rows of the global batch.
          seed: of the data order and of the transform's choices.
          workers: data-loading processes; 0 loads in the main process.
          caption_weights: how often each of a record's captions is drawn; see `ImageTextTransform`.
          min_area: smallest share of an image that a training crop keeps; 1 does not crop.
          augment: what else changes a training image; None changes nothing.
          altered: whether each caption comes with one that is made false by one word, a hard
            negative.
          max_bad_fraction: of records that may be skipped; see `data.skipping`.
        """
        self.processor = processor
        self.batch_size = batch_size
        self._source = source
        self._seed, self._workers = seed, workers
        self._max_bad_fraction = max_bad_fraction
        self._weights, self._min_area = caption_weights, min_area
        self._augment, self.altered = augment, altered

    @functools.cached_property
    def _transform(self) -> ImageTextTransform:
        return ImageTextTransform(
            processor=self.processor.image,
            tokenizer=self.processor.tokenizer,
            weights=self._weights,
            augment=Augment(min_area=self._min_area) if self._min_area < 1 else None,
            image_augment=self._augment,
            altered=self.altered,
        )

    @property
    def tokenizer(self) -> PaddedTokenizer:
        """The tokenizer of the captions."""
        return self.processor.tokenizer

    def examples(self, seed: int) -> Examples:
        """The training records, each with the arrays that the model gets of it."""
        return RecordExamples(self._source, self._transform, seed)

    def loader(self) -> grain.IterDataset:
        """This host's part of each batch, without end; see `ImageTextTransform`."""
        return make_loader(
            self._source,
            self._transform,
            batch_size=self.batch_size,
            seed=self._seed,
            shuffle=True,
            epochs=None,
            num_workers=self._workers,
            max_bad_fraction=self._max_bad_fraction,
        )
