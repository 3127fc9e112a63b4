"""What is in each image, as an evaluation with named objects needs it.

A pair is one (image, class) whose class is annotated. Of any other class an image either is known
to lack it or nothing is known: federated labels (LVIS) name the classes that are absent, complete
ones (MOInst) those that were not annotated exhaustively.
Letters: N images, C classes, P pairs, K captions, U instructions, n objects of an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int, Int8

from perception_jax.data import images
from perception_jax.data.instructions import instruction_for
from perception_jax.data.object_index import objects_kept
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import ObjectAnnotation, Record, Source
from perception_jax.data.views import require_square
from perception_jax.errors import DataError

PRESENT, ABSENT, UNKNOWN = 1, 0, -1
"""Values of `Annotations.labels`."""

STRATA = ("all", "salient", "overlooked")
"""Every number is reported for each; pairs without a box are in "all" only."""

OVERLOOKED_SHARE = 0.02
"""By default, an object below this share of its image's area is overlooked, even the largest."""

FREQUENCIES = ("r", "c", "f")
"""LVIS's groups of classes: rare, common, frequent."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedClass:
    """A class by its name; `frequency` is one of `FREQUENCIES` or None."""

    name: str
    frequency: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """(Image, present class) pairs by image, then class.

    Attributes:
      image, class_id: of each.
      stratum: index into `STRATA`; 0 for a pair that is in "all" only.
      instruction: index into `Annotations.instructions`.
    """

    image: Int[np.ndarray, " P"]
    class_id: Int[np.ndarray, " P"]
    stratum: Int8[np.ndarray, " P"]
    instruction: Int[np.ndarray, " P"]

    def within(self, stratum: str) -> Bool[np.ndarray, " P"]:
        """Which pairs belong to a stratum."""
        place = STRATA.index(stratum)
        return self.stratum == place if place else np.ones(len(self.stratum), bool)


@dataclasses.dataclass(frozen=True, eq=False)
class Captions:
    """All captions in the order images, objects, captions.

    Attributes:
      texts: their words.
      pair: index into the pairs.
      instruction: index into `Annotations.instructions`.
    """

    texts: tuple[str, ...]
    pair: Int[np.ndarray, " K"]
    instruction: Int[np.ndarray, " K"]


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """Labels, pairs, captions and instructions of a data set; `build` or `read` makes them.

    Attributes:
      classes: by class id.
      image_ids: id of each record.
      labels: PRESENT, ABSENT or UNKNOWN.
      pairs, captions: see there.
      instructions: distinct strings; one gallery of conditioned images belongs to each.
      class_instruction: the instruction made from each class's name.
      cropped: number of objects left out because the model's image shows less than half of them.
    """

    classes: tuple[EvaluatedClass, ...]
    image_ids: tuple[str, ...]
    labels: Int8[np.ndarray, "N C"]
    pairs: Pairs
    captions: Captions
    instructions: tuple[str, ...]
    class_instruction: Int[np.ndarray, " C"]
    cropped: int = 0

    @classmethod
    def build(
        cls,
        records: Iterable[Record],
        classes: Sequence[EvaluatedClass],
        *,
        federated: bool,
        overlooked_share: float = OVERLOOKED_SHARE,
        shown: Callable[[Record], Bool[np.ndarray, " n"]] | None = None,
    ) -> Annotations:
        """From records, each taken once, e.g. of scenes, LVIS, COCO or MOInst.

        Objects of other classes, crowds and objects that are not shown are left out. Of a class
        that loses its last object nothing is known.

        Args:
          classes: named as the records' objects.
          federated: True if only annotated classes and `Record.absent` are known of an image, False
            if everything but `Record.not_exhaustive` is.
          overlooked_share: objects below this share of their image's area are overlooked.
          shown: which objects the model's image shows; all by default.

        Raises:
          DataError: no records or classes, or an id that comes twice.
        """
        ids = {one.name: number for number, one in enumerate(classes)}
        instructions: dict[str, int] = {}
        of_class = [
            instructions.setdefault(text, len(instructions))
            for text in (instruction_for(one.name) for one in classes)
        ]
        image_ids: dict[str, None] = {}
        labels, pairs, captions, cropped = [], [], [], 0
        for row, record in enumerate(records):
            if record.id in image_ids:
                raise DataError(f"expected distinct image ids, found {record.id!r} twice")
            image_ids[record.id] = None
            objects = record.objects
            named = [k for k, one in enumerate(objects) if one.name in ids]
            single = [k for k in named if not objects[k].crowd]
            mask = np.ones(len(objects), bool) if shown is None else shown(record)
            kept = [k for k in single if mask[k]]
            cropped += len(single) - len(kept)
            own = {one.target: one.text for one in reversed(record.instructions)}
            number = {
                k: instructions.setdefault(own[k], len(instructions))
                if k in own
                else of_class[ids[objects[k].name]]
                for k in kept
            }
            place: dict[int, int] = {}
            for k, stratum in _standing(record, kept, ids, overlooked_share):
                class_id = ids[objects[k].name]
                place[class_id] = len(pairs)
                pairs.append((row, class_id, stratum, number[k]))
            captions += [
                (text, place[ids[objects[k].name]], number[k])
                for k in kept
                for text in objects[k].captions
            ]
            lost = {ids[objects[k].name] for k in named} - place.keys()
            known = _known(record, ids, len(classes), federated)
            known[list(lost)] = UNKNOWN
            known[list(place)] = PRESENT
            labels.append(known)
        if not labels or not classes:
            raise DataError(
                f"expected images and classes to evaluate, found {len(labels)} images and "
                f"{len(classes)} classes"
            )
        image, class_id, strata, instruction = np.array(pairs, np.int64).reshape(-1, 4).T
        texts, owners, steered = zip(*captions, strict=True) if captions else ((), (), ())
        return cls(
            classes=tuple(classes),
            image_ids=tuple(image_ids),
            labels=np.stack(labels),
            pairs=Pairs(image, class_id, strata.astype(np.int8), instruction),
            captions=Captions(texts, np.array(owners, int), np.array(steered, int)),
            instructions=tuple(instructions),
            class_instruction=np.array(of_class, int),
            cropped=cropped,
        )

    @classmethod
    def read(
        cls,
        source: Source,
        classes: Sequence[EvaluatedClass],
        *,
        federated: bool,
        processor: ImageProcessor,
        overlooked_share: float = OVERLOOKED_SHARE,
    ) -> Annotations:
        """Of every record of a source; images are not decoded.

        The same objects are left out for every model with this processor, the static one included.

        Args:
          classes, federated, overlooked_share: as of `build`.
          processor: what makes the model's image.

        Raises:
          DataError: a size that cannot be read, or labels that do not fit.
          ConfigError: the processor makes images of many sizes.
        """
        require_square(processor)

        def sized() -> Iterator[Record]:
            for record in (source[number] for number in range(len(source))):
                size = record.size or images.read_size(record.image, name=record.id)
                yield dataclasses.replace(record, size=size)

        return cls.build(
            sized(),
            classes,
            federated=federated,
            overlooked_share=overlooked_share,
            shown=lambda record: objects_kept(record, processor.geometry),
        )

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def relevant(self, stratum: str) -> Bool[np.ndarray, "N C"]:
        """Present pairs of a stratum."""
        chosen = self.pairs.within(stratum)
        marks = np.zeros(self.labels.shape, bool)
        marks[self.pairs.image[chosen], self.pairs.class_id[chosen]] = True
        return marks

    def allowed(self, stratum: str) -> Bool[np.ndarray, "N C"]:
        """Pairs in a ranking per image or class: those of the stratum and all absent ones."""
        return self.relevant(stratum) | (self.labels == ABSENT)


def _standing(
    record: Record, kept: Sequence[int], ids: dict[str, int], overlooked_share: float
) -> Iterator[tuple[int, int]]:
    """Yields, by class, the object that stands for it (the largest, the first of equal ones), and
    the index of its stratum.

    Without the image's size only what is not the largest is known.
    """
    objects = record.objects
    areas = {k: _area(objects[k]) for k in kept}
    by_class: dict[int, list[int]] = {}
    for k in kept:
        by_class.setdefault(ids[objects[k].name], []).append(k)
    leading = {objects[k].name for k in kept if objects[k].salient}
    if kept and all(objects[k].salient is None for k in kept):
        leading = {objects[max(kept, key=areas.__getitem__)].name}
    whole = None if record.size is None else float(record.size[0] * record.size[1])
    for _, members in sorted(by_class.items()):
        k, stratum = max(members, key=areas.__getitem__), "all"
        if areas[k] >= 0 and objects[k].name not in leading:
            stratum = "overlooked"
        elif areas[k] >= 0 and whole is not None:
            stratum = "overlooked" if areas[k] < overlooked_share * whole else "salient"
        yield k, STRATA.index(stratum)


def _area(one: ObjectAnnotation) -> float:
    """Pixels of the original image; -1 without a box."""
    if one.box is None:
        return -1.0
    left, top, right, bottom = one.box
    # Corners of equal boxes differ in the last bits; equal areas must stay equal.
    return round((right - left) * (bottom - top), 6)


def _known(
    record: Record, ids: dict[str, int], classes: int, federated: bool
) -> Int8[np.ndarray, " C"]:
    """What the record says of classes without an object."""
    labels = np.full(classes, UNKNOWN if federated else ABSENT, np.int8)
    listed = record.absent if federated else record.not_exhaustive
    labels[[ids[name] for name in listed if name in ids]] = ABSENT if federated else UNKNOWN
    return labels
