"""The training data of GiVE: the sampler's rows as batches of arrays."""

from __future__ import annotations

import logging

import grain
import numpy as np

from perception_jax.data.loader import make_loader
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record, Source
from perception_jax.data.skipping import MAX_BAD_FRACTION, usable
from perception_jax.data.tokenization import PaddedTokenizer
from perception_jax.errors import ConfigError
from perception_jax.systems.give.data.annotations import index_objects
from perception_jax.systems.give.data.held import HeldBatches
from perception_jax.systems.give.data.object_index import ObjectIndex
from perception_jax.systems.give.data.rows import GroupTransform
from perception_jax.systems.give.data.sampler import BatchPlanner, ClassGroups, GroupConfig

_LOGGER = logging.getLogger(__name__)


class TrainingData:
    """A source of records, ready to train GiVE on.

    Attributes:
      index: what the source shows; `index.instructions.strings` are the texts that the batches'
        "instruction" and "absent_instruction" count.
      tokenizer: of the captions.
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
        max_bad_fraction: float = MAX_BAD_FRACTION,
    ):
        """Indexes the source; see `annotations.index_objects` for `template` and
        `own_instructions`, and for what it raises.

        Args:
          hold: process every image once and keep it, for data that fit in memory.
          altered: add captions with one attribute changed (`PlusConfig.altered`).
          max_bad_fraction: of records that may be skipped; see `data.skipping`.
        """
        self.tokenizer = tokenizer
        if hold:  # every batch is planned from what can be held
            records = usable(records, max_bad_fraction=max_bad_fraction)
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
        self._max_bad_fraction = max_bad_fraction
        self._planner = BatchPlanner(self.index, config)
        self._records, self._hold = records, hold
        self._groups = ClassGroups(records, self._planner)
        self._transform = GroupTransform(processor=processor, tokenizer=tokenizer, altered=altered)

    @property
    def batches_per_epoch(self) -> int:
        """Batches with as many rows as the source has usable objects."""
        return self._planner.batches_per_epoch

    def source(self) -> ClassGroups:
        """The rows of all batches, in order."""
        return self._groups

    def transform(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """What the model sees of a row."""
        return self._transform(record, rng)

    def loader(
        self,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
        host: tuple[int, int] | None = None,
    ) -> grain.IterDataset:
        """This host's part of each batch, without end; see `data.loader.make_loader`.

        Args:
          batch_size: what the trainer expects, to compare; None does not.

        Raises:
          ConfigError: the groups make another batch size.
        """
        config = self._planner.config
        if batch_size not in (None, config.batch_size):
            raise ConfigError(
                f"batch_size: expected 2 × {config.groups} groups × {config.images} images = "
                f"{config.batch_size}, found {batch_size}. Change one of them."
            )
        if self._hold:
            held = HeldBatches(self._records, self._planner, self._transform, host=host)
            return held.dataset()
        return make_loader(
            self._groups,
            self._transform,
            batch_size=config.batch_size,
            seed=config.seed,
            shuffle=False,
            num_workers=num_workers,
            host=host,
            max_bad_fraction=self._max_bad_fraction,
        )
