"""Records of the library as evaluated images and classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from perception_jax.data import images
from perception_jax.data.moinst.record import MoinstClass, MoinstImage, MoinstObject
from perception_jax.data.object_index import objects_kept
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import ObjectAnnotation, Record, Source
from perception_jax.data.views import require_square
from perception_jax.evals.conditioned.annotations import (
    OVERLOOKED_SHARE,
    Annotations,
    EvaluatedClass,
    EvaluatedImage,
    EvaluatedObject,
)


def from_moinst(image: MoinstImage) -> EvaluatedImage:
    """A canonical record; class ids are its own."""
    sides = image.width, image.height
    return EvaluatedImage(
        id=image.image_id,
        area=None if None in sides else float(sides[0] * sides[1]),
        objects=tuple(_from_moinst(one) for one in image.objects),
        negative=image.neg_class_ids or (),
        nonexhaustive=image.nonexhaustive_class_ids or (),
    )


def moinst_classes(table: Iterable[MoinstClass]) -> tuple[EvaluatedClass, ...]:
    """A class table, by class id."""
    return tuple(EvaluatedClass(name=one.name, frequency=one.frequency) for one in table)


def from_record(
    record: Record, classes: Mapping[str, int], size: tuple[int, int] | None = None
) -> EvaluatedImage:
    """Any record: one of scenes, LVIS, COCO or MOInst.

    Of a class that is only there as a crowd nothing is known.

    Args:
      classes: class id of each evaluated name; objects of other classes are left out.
      size: width and height of the original image, if the record does not say.
    """
    width, height = record.size or size or (0, 0)
    chosen = [k for k, one in enumerate(record.objects) if one.name in classes]
    instructions = {one.target: one.text for one in reversed(record.instructions)}
    objects = [
        EvaluatedObject(
            class_id=classes[record.objects[k].name],
            area=_area(record.objects[k]),
            captions=record.objects[k].captions,
            instruction=instructions.get(k),
            salient=record.objects[k].salient,
        )
        for k in chosen
    ]
    image = EvaluatedImage(
        id=record.id,
        area=float(width * height) or None,
        objects=tuple(objects),
        negative=tuple(classes[name] for name in record.absent if name in classes),
        nonexhaustive=tuple(classes[name] for name in record.not_exhaustive if name in classes),
    )
    return image.keep([not record.objects[k].crowd for k in chosen])


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """The annotations of a source, ready for an evaluation.

    Attributes:
      annotations: of the source's records, in order.
      cropped: number of objects left out because the model's image shows less than half of them.
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
    ids = {one.name: number for number, one in enumerate(classes)}
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


def _from_moinst(one: MoinstObject) -> EvaluatedObject:
    return EvaluatedObject(
        class_id=one.class_id,
        area=None if one.bbox is None else one.bbox[2] * one.bbox[3],
        captions=one.captions,
        instruction=one.instruction,
        salient=one.salient,
    )


def _area(one: ObjectAnnotation) -> float | None:
    if one.box is None:
        return None
    left, top, right, bottom = one.box
    # Corners of equal boxes differ in the last bits; equal areas must stay equal.
    return round((right - left) * (bottom - top), 6)
