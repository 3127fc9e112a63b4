"""What is in each image, as an evaluation with named objects needs it.

A pair is one (image, class) whose class is annotated. Of any other class an image either is known
to lack it or nothing is known: federated labels (LVIS) name the classes that are absent, complete
ones (MOInst) those that were not annotated exhaustively.
Letters: N images, C classes, P pairs, K captions, U instructions, n objects of an image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
        """Builds annotations from records of any data set, each of which is read once.

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
            class_of = [ids.get(one.name) for one in record.objects]
            single = [
                k for k, c in enumerate(class_of) if c is not None and not record.objects[k].crowd
            ]
            mask = np.ones(len(class_of), bool) if shown is None else shown(record)
            kept = {k: class_of[k] for k in single if mask[k]}
            cropped += len(single) - len(kept)
            own = {one.target: one.text for one in reversed(record.instructions)}
            number = {
                k: instructions.setdefault(own[k], len(instructions)) if k in own else of_class[c]
                for k, c in kept.items()
            }
            place: dict[int, int] = {}
            for k, stratum in _standing(record, kept, overlooked_share):
                place[kept[k]] = len(pairs)
                pairs.append((row, kept[k], stratum, number[k]))
            captions += [
                (text, place[c], number[k])
                for k, c in kept.items()
                for text in record.objects[k].captions
            ]
            lost = set(class_of) - {None} - place.keys()
            labels.append(_labels(record, ids, len(classes), federated))
            labels[-1][list(lost)] = UNKNOWN
            labels[-1][list(place)] = PRESENT
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
        """Builds annotations from all records of a source; images are not decoded.

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
    record: Record, kept: Mapping[int, int], overlooked_share: float
) -> Iterator[tuple[int, int]]:
    """Yields, by class, the object that stands for it (the largest, the first of equal ones), and
    the index of its stratum.

    Without the image's size only what is not the largest is known.

    Args:
      kept: objects that count, and their classes.
    """
    areas = {k: _area(record.objects[k]) for k in kept}
    marks = {k: record.objects[k].salient for k in kept}
    leading = {kept[k] for k, mark in marks.items() if mark}
    if kept and set(marks.values()) == {None}:
        leading = {kept[max(kept, key=areas.__getitem__)]}
    whole = None if record.size is None else float(record.size[0] * record.size[1])
    for class_id in sorted(set(kept.values())):
        k = max((k for k, c in kept.items() if c == class_id), key=areas.__getitem__)
        stratum = "all"
        if areas[k] >= 0 and class_id not in leading:
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


def _labels(
    record: Record, ids: dict[str, int], classes: int, federated: bool
) -> Int8[np.ndarray, " C"]:
    """What the record says of classes without an object."""
    labels = np.full(classes, UNKNOWN if federated else ABSENT, np.int8)
    listed = record.absent if federated else record.not_exhaustive
    labels[[ids[name] for name in listed if name in ids]] = ABSENT if federated else UNKNOWN
    return labels
