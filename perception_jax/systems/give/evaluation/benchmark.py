"""An evaluation of GiVE on the records of a source."""

from __future__ import annotations

from collections.abc import Sequence

from perception_jax.api import Processor
from perception_jax.data.records import Source
from perception_jax.data.skipping import MAX_BAD_FRACTION, usable
from perception_jax.evals.conditioned.annotations import Annotations, EvaluatedClass
from perception_jax.inference.pixels import PixelsInMemory, PixelsOfSource, blank_image
from perception_jax.systems.give.encode import ConditionedEncoder, InstructionConfig
from perception_jax.systems.give.evaluation.evaluate import Evaluation, EvaluationConfig


def evaluation_of(
    source: Source,
    processor: Processor,
    *,
    classes: Sequence[str],
    federated: bool,
    instruction: InstructionConfig | None = None,
    config: EvaluationConfig | None = None,
    in_memory: bool = False,
    workers: int = 0,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> Evaluation:
    """Every protocol on all records of a source that can be used.

    Records that cannot be read or decoded are skipped before anything is measured, as in training.

    Args:
      classes: names that are asked about.
      federated: whether only classes that a record lists as absent are known to be absent.
      instruction: as in training.
      in_memory: process every image once and keep it, or read it anew for every block.
      workers: processes that read images anew; 0 for threads.
      max_bad_fraction: of records that may be skipped; see `data.skipping`.

    Raises:
      DataError: too many records that cannot be used, or labels that do not fit.
    """
    config = config or EvaluationConfig()
    source = usable(source, max_bad_fraction=max_bad_fraction)
    annotations = Annotations.read(
        source,
        tuple(EvaluatedClass(name=name) for name in classes),
        federated=federated,
        processor=processor.image,
        overlooked_share=config.overlooked_share,
    )
    pixels = PixelsOfSource(source, processor.image, workers=workers)
    return Evaluation(
        ConditionedEncoder(processor, instruction),
        annotations,
        PixelsInMemory.of(pixels) if in_memory else pixels,
        blank=blank_image(processor.image),
        records=source,
        config=config,
    )
