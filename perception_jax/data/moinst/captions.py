"""Captions for MOInst-R from an external multimodal model: writes questions, reads answers.

Questions, one JSON line per object:

    {"image_id": 391895, "object_id": 5521, "file": "train2017/000000391895.jpg",
     "class": "motorcycle", "box": [x1, y1, x2, y2], "prompt": "Describe only the motorcycle …"}

`box` is the object's box enlarged 1.5 times around its centre, cut at the image's edges: show the
model the whole image and this part. Answers, one JSON line per caption, any number per object:

    {"image_id": 391895, "object_id": 5521, "caption": "a red motorcycle on a dirt road",
     "cosine": 0.27}

`cosine` (may be missing) is that of the caption and the enlarged box's pixels under CLIP-L/14.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from perception_jax.data.geometry import clip_boxes
from perception_jax.data.moinst.names import clean_name, mentions
from perception_jax.data.moinst.record import MoinstClass, MoinstImage, MoinstObject
from perception_jax.data.records import Box
from perception_jax.data.sources import fields
from perception_jax.errors import DataError

PROMPT = (
    "Describe only the {name} inside the marked region in one short sentence (at most 20 words). "
    "Mention its colour, state, position or what it touches. Do not describe other things. If "
    "there is no {name}, answer NONE."
)
"""The question to the multimodal model."""
ENLARGED = 1.5
"""Factor on the sides of an object's box in the questions."""
MAX_WORDS = 25
"""Longest caption that is kept, words."""
MIN_COSINE = 0.18
"""Smallest cosine between crop and caption for which a caption is kept."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Captioned:
    """Captioned records without the objects and images that lack captions, with counts."""

    images: tuple[MoinstImage, ...]
    report: Mapping[str, int]


def questions(images: Iterable[MoinstImage]) -> Iterator[dict[str, Any]]:
    """Returns the questions for the model, one for each object.

    Raises:
      DataError: an object without a box or an id, or an image without a size.
    """
    for image in images:
        for one in image.objects:
            if one.bbox is None or one.object_id is None or None in (image.width, image.height):
                raise DataError(
                    f"image {image.image_id}: expected a size, and an id and a box for each "
                    f"object, found {one}. Build the set with the LVIS step."
                )
            box = enlarged(one.bbox, (image.width, image.height))
            yield {
                "image_id": image.image_id,
                "object_id": one.object_id,
                "file": image.file,
                "class": one.name,
                "box": [round(side, 2) for side in box],
                "prompt": PROMPT.format(name=clean_name(one.name)),
            }


def enlarged(bbox: Sequence[float], size: tuple[int, int]) -> Box:
    """A box (x, y, width, height) `ENLARGED` times as long on each side, cut to the image; xyxy."""
    x, y, width, height = bbox
    grown_x, grown_y = (0.5 * (ENLARGED - 1) * side for side in (width, height))
    corners = [x - grown_x, y - grown_y, x + width + grown_x, y + height + grown_y]
    return tuple(clip_boxes(np.array(corners, np.float64), *size).tolist())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaptionAnswer:
    """An answer of the model; `cosine` is None where it was not computed."""

    image_id: int | str
    object_id: int
    caption: str
    cosine: float | None = None


def read_answers(path: str | os.PathLike) -> tuple[CaptionAnswer, ...]:
    """The answers of a file.

    Raises:
      DataError: naming file, line and key.
    """
    return tuple(fields.json_lines(path, _answer))


def add_captions(
    images: Iterable[MoinstImage], classes: Sequence[MoinstClass], answers: Iterable[CaptionAnswer]
) -> Captioned:
    """Assigns filtered captions to their objects.

    A caption is dropped that says NONE, that has neither the class name nor a synonym, that is
    longer than `MAX_WORDS`, or whose cosine is below `MIN_COSINE`. An object without captions goes,
    and its class is then not exhaustively annotated in that image; an image without objects goes.

    Raises:
      DataError: an answer to an object that the records do not have.
    """
    images = list(images)
    known = {(image.image_id, one.object_id) for image in images for one in image.objects}
    by_object: dict[tuple[Any, Any], list[CaptionAnswer]] = collections.defaultdict(list)
    for answer in answers:
        key = answer.image_id, answer.object_id
        if key not in known:
            raise DataError(
                f"captions: image {answer.image_id}, object {answer.object_id}: the records have "
                "no such object. Are the captions of another build of the set?"
            )
        by_object[key].append(answer)
    report: collections.Counter[str] = collections.Counter(dict.fromkeys(_COUNTED, 0))
    kept = []
    for image in images:
        objects = [_captioned(image, one, classes, by_object, report) for one in image.objects]
        objects = [one for one in objects if one.captions]
        report["objects_dropped"] += len(image.objects) - len(objects)
        if objects:
            kept.append(_without_the_others(image, objects))
    counts = {
        **report,
        "objects": sum(len(image.objects) for image in kept),
        "images": len(kept),
        "images_dropped": len(images) - len(kept),
    }
    return Captioned(images=tuple(kept), report=counts)


_COUNTED = (
    "captions",
    "dropped_none",
    "dropped_without_name",
    "dropped_too_long",
    "dropped_low_cosine",
    "kept_without_cosine",
    "objects_without_answer",
    "objects_dropped",
)


def _captioned(
    image: MoinstImage,
    one: MoinstObject,
    classes: Sequence[MoinstClass],
    answers: Mapping[tuple[Any, Any], Sequence[CaptionAnswer]],
    report: collections.Counter[str],
) -> MoinstObject:
    names = (one.name, *classes[one.class_id].synonyms)
    given = answers.get((image.image_id, one.object_id), ())
    report["objects_without_answer"] += not given
    kept = []
    for answer in given:
        fault = _fault(answer, names)
        report[f"dropped_{fault}" if fault else "captions"] += 1
        if not fault:
            report["kept_without_cosine"] += answer.cosine is None
            kept.append(answer.caption.strip())
    return dataclasses.replace(one, captions=tuple(dict.fromkeys(kept)))


def _fault(answer: CaptionAnswer, names: Sequence[str]) -> str:
    """Why a caption is dropped; "" if it is not."""
    if answer.caption.strip(" \n\"'.") == "NONE":
        return "none"
    if not mentions(answer.caption, names):
        return "without_name"
    if len(answer.caption.split()) > MAX_WORDS:
        return "too_long"
    return "low_cosine" if answer.cosine is not None and answer.cosine < MIN_COSINE else ""


def _without_the_others(image: MoinstImage, objects: Sequence[MoinstObject]) -> MoinstImage:
    gone = {one.class_id for one in image.objects} - {one.class_id for one in objects}
    unsure = sorted(gone.union(image.nonexhaustive_class_ids or ()))
    return dataclasses.replace(
        image,
        objects=tuple(objects),
        nonexhaustive_class_ids=tuple(unsure) if gone else image.nonexhaustive_class_ids,
    )


def _answer(value: Any, where: str) -> CaptionAnswer:
    required = ("image_id", "object_id", "caption")
    return CaptionAnswer(**fields.entries(value, where, _ANSWER, required))


def _number(value: Any, where: str) -> float:
    return fields.numbers(1)([value], where)[0]


_ANSWER: Mapping[str, fields.Check] = {
    "image_id": fields.identity,
    "object_id": fields.integer,
    "caption": fields.text,
    "cosine": fields.optional(_number),
}
