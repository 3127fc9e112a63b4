"""What a source says about its images, ready for an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from perception_jax.data import images
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Source
from perception_jax.data.views import require_square
from perception_jax.evals.conditioned.annotations import (
    OVERLOOKED_SHARE,
    Annotations,
    EvaluatedClass,
)
from perception_jax.evals.conditioned.convert import from_record
from perception_jax.systems.give.data.annotations import objects_kept


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """Attributes:
    annotations: of the source's records, in order.
    cropped: objects left out because the model's image shows less than half of them.
    """

    annotations: Annotations
    cropped: int


def read_labels(
    source: Source,
    classes: Sequence[EvaluatedClass],
    *,
    federated: bool,
    processor: ImageProcessor,
    overlooked_share: float = OVERLOOKED_SHARE,
) -> Labels:
    """Reads every record once; images are not decoded.

    The same objects are left out for every model with this processor, the static one included.

    Args:
      classes: named as the records' objects.
      federated, overlooked_share: see `Annotations.build`.
      processor: what makes the model's image.

    Raises:
      DataError: a size that cannot be read, or labels that do not fit.
      ConfigError: the processor makes images of many sizes.
    """
    require_square(processor)
    ids = {kind.name: number for number, kind in enumerate(classes)}
    found, cropped = [], 0
    for number in range(len(source)):
        record = source[number]
        size = record.size or images.read_size(record.image, name=record.id)
        shown = objects_kept(record, processor.geometry, size)
        known = [one.name in ids and not one.crowd for one in record.objects]
        image = from_record(record, ids, size)
        found.append(image.keep(shown[known].tolist()))
        cropped += int(np.count_nonzero(~shown[known]))
    annotations = Annotations.build(
        found, classes, federated=federated, overlooked_share=overlooked_share
    )
    return Labels(annotations, cropped)
