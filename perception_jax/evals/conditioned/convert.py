"""Records of the library as evaluated images and classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from perception_jax.data.moinst.record import MoinstClass, MoinstImage, MoinstObject
from perception_jax.data.records import ObjectAnnotation, Record
from perception_jax.evals.conditioned.annotations import (
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

    Takes from `Record.extras` what sources put there: "captions" and "salient" (of each object),
    "not_exhaustive" (names) and "size". Of a class that is only there as a crowd nothing is known.

    Args:
      classes: class id of each evaluated name; objects of other classes are left out.
      size: width and height of the original image, if the record does not say.
    """
    extras = record.extras
    width, height = extras.get("size", size) or (0, 0)
    chosen = [k for k, one in enumerate(record.objects) if one.name in classes]
    captions, salient = extras.get("captions"), extras.get("salient")
    instructions = {one.target: one.text for one in reversed(record.instructions)}
    objects = [
        EvaluatedObject(
            class_id=classes[record.objects[k].name],
            area=_area(record.objects[k]),
            captions=_captions(record.objects[k]) if captions is None else tuple(captions[k]),
            instruction=instructions.get(k),
            salient=None if salient is None else salient[k],
        )
        for k in chosen
    ]
    unsure = extras.get("not_exhaustive", ())
    image = EvaluatedImage(
        id=record.id,
        area=float(width * height) or None,
        objects=tuple(objects),
        negative=tuple(classes[name] for name in record.absent if name in classes),
        nonexhaustive=tuple(classes[name] for name in unsure if name in classes),
    )
    return image.keep([not record.objects[k].crowd for k in chosen])


def _from_moinst(one: MoinstObject) -> EvaluatedObject:
    return EvaluatedObject(
        class_id=one.class_id,
        area=None if one.bbox is None else one.bbox[2] * one.bbox[3],
        captions=one.captions,
        instruction=one.instruction,
        salient=one.salient,
    )


def _captions(one: ObjectAnnotation) -> tuple[str, ...]:
    return (one.caption,) if one.caption else ()


def _area(one: ObjectAnnotation) -> float | None:
    if one.box is None:
        return None
    left, top, right, bottom = one.box
    # Corners of equal boxes differ in the last bits; equal areas must stay equal.
    return round((right - left) * (bottom - top), 6)
