"""What is in each image, as an evaluation with named objects needs it.

A pair is one (image, class) whose class is annotated. Of any other class an image either is known
to lack it or nothing is known: federated labels (LVIS) name the classes that are absent, complete
ones (MOInst) those that were not annotated exhaustively.
Letters: N images, C classes, P pairs, K captions, U instructions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int, Int8

from perception_jax.data.instructions import instruction_for
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedObject:
    """One object of an image.

    Attributes:
      class_id: index into the classes.
      area: width times height of its box in original pixels, None without a box.
      captions: sentences about it.
      instruction: its own, or None for one made from the class name.
      salient: a mark that replaces "largest of its image"; None if the data has no marks.
    """

    class_id: int
    area: float | None = None
    captions: tuple[str, ...] = ()
    instruction: str | None = None
    salient: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedImage:
    """One image.

    Attributes:
      id: unique.
      area: width times height in pixels, None if unknown.
      objects: in the record's order.
      negative: classes known to be absent.
      nonexhaustive: classes of which nothing is known unless they are annotated.
    """

    id: int | str
    area: float | None
    objects: tuple[EvaluatedObject, ...] = ()
    negative: tuple[int, ...] = ()
    nonexhaustive: tuple[int, ...] = ()

    def keep(self, kept: Sequence[bool]) -> EvaluatedImage:
        """Without the objects that a crop cut away.

        Nothing is claimed of a class that loses its last object: it becomes nonexhaustive.
        """
        objects = tuple(o for o, stays in zip(self.objects, kept, strict=True) if stays)
        lost = {o.class_id for o in self.objects} - {o.class_id for o in objects}
        return dataclasses.replace(
            self,
            objects=objects,
            negative=tuple(c for c in self.negative if c not in lost),
            nonexhaustive=tuple(sorted({*self.nonexhaustive, *lost})),
        )


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
    """Labels, pairs, captions and instructions of a data set; make it with `build`.

    Attributes:
      classes: by class id.
      image_ids: of each image.
      labels: PRESENT, ABSENT or UNKNOWN.
      pairs, captions: see there.
      instructions: distinct strings; one gallery of conditioned images belongs to each.
      class_instruction: the instruction made from each class's name.
    """

    classes: tuple[EvaluatedClass, ...]
    image_ids: tuple[int | str, ...]
    labels: Int8[np.ndarray, "N C"]
    pairs: Pairs
    captions: Captions
    instructions: tuple[str, ...]
    class_instruction: Int[np.ndarray, " C"]

    @classmethod
    def build(
        cls,
        images: Sequence[EvaluatedImage],
        classes: Sequence[EvaluatedClass],
        *,
        federated: bool,
        overlooked_share: float = OVERLOOKED_SHARE,
    ) -> Annotations:
        """From images and classes.

        Args:
          overlooked_share: objects below this share of their image's area are overlooked.
          federated: True if only annotated classes and `negative` are known of an image, False if
            everything but `nonexhaustive` is.

        Raises:
          DataError: no images or classes, an id that comes twice, or a class id out of range.
        """
        _check(images, classes)
        instructions: dict[str, int] = {}
        of_class = [_number(instructions, instruction_for(c.name)) for c in classes]
        found = [
            pair for k, image in enumerate(images) for pair in _pairs(k, image, overlooked_share)
        ]
        place = {(pair.image, pair.object.class_id): row for row, pair in enumerate(found)}
        texts, owners, steered = [], [], []
        for k, image in enumerate(images):
            for item in image.objects:
                number = _instruction(item, instructions, of_class)
                for text in item.captions:
                    texts.append(text)
                    owners.append(place[k, item.class_id])
                    steered.append(number)
        pairs = Pairs(
            np.array([pair.image for pair in found], np.int64),
            np.array([pair.object.class_id for pair in found], np.int64),
            np.array([pair.stratum for pair in found], np.int8),
            np.array([_instruction(pair.object, instructions, of_class) for pair in found], int),
        )
        return cls(
            classes=tuple(classes),
            image_ids=tuple(image.id for image in images),
            labels=_labels(images, len(classes), federated),
            pairs=pairs,
            captions=Captions(tuple(texts), np.array(owners, int), np.array(steered, int)),
            instructions=tuple(instructions),
            class_instruction=np.array(of_class, int),
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Pair:
    """A present class of an image, the object that stands for it, and its stratum."""

    image: int
    object: EvaluatedObject
    stratum: int


def _pairs(row: int, image: EvaluatedImage, overlooked_share: float) -> list[_Pair]:
    """Pairs of an image by class, each stood for by its largest box, the first of equal ones."""
    by_class: dict[int, list[EvaluatedObject]] = {}
    for item in image.objects:
        by_class.setdefault(item.class_id, []).append(item)
    standing = {kind: max(items, key=_area) for kind, items in sorted(by_class.items())}
    marked = any(item.salient is not None for item in image.objects)
    if marked:
        leading = {item.class_id for item in image.objects if item.salient}
    else:
        leading = {max(image.objects, key=_area).class_id} if image.objects else set()
    return [
        _Pair(row, item, _stratum(item, image.area, kind in leading, overlooked_share))
        for kind, item in standing.items()
    ]


def _area(item: EvaluatedObject) -> float:
    return -1.0 if item.area is None else item.area


def _stratum(item: EvaluatedObject, image_area: float | None, leads: bool, share: float) -> int:
    """Index into `STRATA`. Without the image's size only what is not the largest is known."""
    if item.area is None:
        return 0
    if not leads:
        return STRATA.index("overlooked")
    if image_area is None:
        return 0
    small = item.area < share * image_area
    return STRATA.index("overlooked" if small else "salient")


def _instruction(item: EvaluatedObject, known: dict[str, int], of_class: Sequence[int]) -> int:
    if item.instruction is None:
        return of_class[item.class_id]
    return _number(known, item.instruction)


def _number(known: dict[str, int], text: str) -> int:
    return known.setdefault(text, len(known))


def _labels(images: Sequence[EvaluatedImage], classes: int, federated: bool) -> np.ndarray:
    labels = np.full((len(images), classes), UNKNOWN if federated else ABSENT, np.int8)
    for row, image in enumerate(images):
        if federated:
            labels[row, list(image.negative)] = ABSENT
        else:
            labels[row, list(image.nonexhaustive)] = UNKNOWN
        labels[row, [item.class_id for item in image.objects]] = PRESENT
    return labels


def _check(images: Sequence[EvaluatedImage], classes: Sequence[EvaluatedClass]) -> None:
    if not images or not classes:
        raise DataError(
            f"expected images and classes to evaluate, found {len(images)} images and "
            f"{len(classes)} classes"
        )
    seen: set[int | str] = set()
    for image in images:
        if image.id in seen:
            raise DataError(f"expected distinct image ids, found {image.id!r} twice")
        seen.add(image.id)
        named = [*(o.class_id for o in image.objects), *image.negative, *image.nonexhaustive]
        wrong = [c for c in named if not 0 <= c < len(classes)]
        if wrong:
            raise DataError(
                f"image {image.id!r}: expected class ids in [0, {len(classes)}), found "
                f"{wrong[0]}; use the class table that the records were made with"
            )
