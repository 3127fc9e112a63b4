"""The training data of GiVE: objects of records, planned in groups of one class."""

from __future__ import annotations

import logging

from perception_jax.data.planned import PlannedData
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Source
from perception_jax.data.skipping import MAX_BAD_FRACTION
from perception_jax.data.tokenization import PaddedTokenizer
from perception_jax.systems.give.data.annotations import index_objects
from perception_jax.systems.give.data.object_index import ObjectIndex
from perception_jax.systems.give.data.rows import ObjectRows
from perception_jax.systems.give.data.sampler import BatchPlanner, GroupConfig

_LOGGER = logging.getLogger(__name__)


class TrainingData(PlannedData):
    """A source of records, ready to train GiVE on.

    Attributes:
      index: what the source shows; `index.instructions.strings` are the texts that the batches'
        "instruction_index" and "absent_instruction_index" count.
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
            ObjectRows(self.index, processor=processor, tokenizer=tokenizer, altered=altered),
            in_memory=hold,
            max_bad_fraction=max_bad_fraction,
        )
