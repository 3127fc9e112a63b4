"""What a source says about its images, ready for an evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from perception_jax.data import images
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record, Source
from perception_jax.evals.conditioned.annotations import Annotations, EvaluatedClass
from perception_jax.evals.conditioned.convert import from_record
from perception_jax.systems.give.data.visibility import MIN_VISIBLE, kept_share


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
) -> Labels:
    """Reads every record once; images are not decoded.

    The same objects are left out for every model with this processor, the static one included.

    Args:
      classes: named as the records' objects.
      federated: see `Annotations.build`.
      processor: what makes the model's image.

    Raises:
      DataError: a size that cannot be read, or labels that do not fit.
    """
    ids = {kind.name: number for number, kind in enumerate(classes)}
    found, cropped = [], 0
    for number in range(len(source)):
        record = source[number]
        size = record.size or images.read_size(record.image, name=record.id)
        shown = _shown(record, size, processor)
        known = [one.name in ids and not one.crowd for one in record.objects]
        image = from_record(record, ids, size)
        found.append(image.keep(shown[known].tolist()))
        cropped += int(np.count_nonzero(~shown[known]))
    return Labels(Annotations.build(found, classes, federated=federated), cropped)


def _shown(
    record: Record, size: tuple[int, int], processor: ImageProcessor
) -> Bool[np.ndarray, " n"]:
    """Which objects the model's image shows; those without a box count as shown."""
    shown = np.ones(len(record.objects), bool)
    boxed = [k for k, one in enumerate(record.objects) if one.box is not None]
    if boxed:
        boxes = np.array([record.objects[k].box for k in boxed], np.float64)
        sizes = np.tile(np.array([size], np.int64), (len(boxed), 1))
        shown[boxed] = kept_share(boxes, sizes, processor) >= MIN_VISIBLE
    return shown
