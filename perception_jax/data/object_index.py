"""An index of the objects of a source: which classes each image shows, lacks, or may show.

`index_objects` reads every record once, without decoding images; samplers then work on the index
alone. A class is identified by its name. A crowd is not an object, but its class is not absent
either.

Letters: N annotations, I images (records of the source), P pairs of an image and a class that it
shows, E entries (the captions of a pair's objects), C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Int, Int32

from perception_jax.data import images
from perception_jax.data.geometry import Geometry
from perception_jax.data.instructions import InstructionTable, instruction_for
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.ragged import RaggedRows
from perception_jax.data.records import Record, Source
from perception_jax.data.skipping import MAX_BAD_FRACTION, Watch, sound_records
from perception_jax.errors import DataError, ImageError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of what an index holds, and of what it left out.

    Attributes:
      images: images with at least one usable object.
      annotations: usable objects.
      pairs: distinct pairs of an image and the class of a usable object.
      classes: distinct classes of the pairs.
      cropped: objects of which the crop keeps less than half.
      uncaptioned: of the others, objects without a caption.
      never_absent: of the others, objects of images for which no class is known to be absent.
      unnamed: objects without a class.
    """

    images: int
    annotations: int
    pairs: int
    classes: int
    cropped: int
    uncaptioned: int
    never_absent: int
    unnamed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.annotations:,} objects ({self.pairs:,} pairs) of {self.classes:,} classes in "
            f"{self.images:,} images; left out: {self.cropped:,} by the crop, "
            f"{self.uncaptioned:,} without a caption, {self.never_absent:,} in images that lack no "
            "class" + (f", {self.unnamed:,} without a class" if self.unnamed else "")
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ObjectIndex:
    """Classes, captions and instructions of the objects of a source, by image and by class.

    Attributes:
      names: of the classes. The first `annotated` of them have an object somewhere; the others only
        occur as absent.
      instructions: of these classes, and the records' own.
      captions: the distinct captions.
      pairs: the classes of each image; the index of a pair is its place in `pairs.values`.
      pair_images: the image of each pair.
      by_class: the pairs of each class, ascending.
      entries: the captions of each pair, those of each of its objects.
      entry_own: index of the own instruction of the entry's object, or -1.
      entry_objects: position of the entry's object in its record.
      present: classes annotated in each image, those of unusable objects included.
      excluded: classes that are annotated, or not exhaustively annotated, in an image, and so never
        count as absent; ascending.
      negative: classes verified to be absent from an image.
      together: number of images in which two classes are annotated.
      counts: see there.
    """

    names: tuple[str, ...]
    annotated: int
    instructions: InstructionTable
    captions: tuple[str, ...]
    pairs: RaggedRows
    pair_images: Int32[np.ndarray, " P"]
    by_class: RaggedRows
    entries: RaggedRows
    entry_own: Int32[np.ndarray, " E"]
    entry_objects: Int32[np.ndarray, " E"]
    present: RaggedRows
    excluded: RaggedRows
    negative: RaggedRows
    together: Int32[np.ndarray, "C C"]
    counts: Counts


def index_objects(
    source: Source,
    *,
    processor: ImageProcessor | None = None,
    template: str | None = None,
    own_instructions: bool = True,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> ObjectIndex:
    """Indexes the objects of a source; records that cannot be read have none.

    Args:
      source: records with objects; images are not decoded.
      processor: processor of the model's images. Objects of which its crop keeps less than half
        are left out, since their label would be wrong for the cropped image. None keeps all.
      template: caption of objects that have none, "{}" for the class name, e.g. "a photo of a
        {}."; None leaves such objects out.
      own_instructions: use records' own instructions where they have them.
      max_bad_fraction: of records that may be skipped; see `data.skipping`.

    Raises:
      DataError: no usable object, or too many records that cannot be read.
    """
    found = _Annotations(template, own_instructions, processor)
    for number, record in sound_records(source, Watch(len(source), max_bad_fraction)):
        found.add(number, record)
    index = found.index(len(source))
    if not index.counts.pairs:
        raise DataError(
            f"expected objects with captions, found {index.counts}. The index holds objects that "
            "have a class and a caption; set `template` to make captions of class names."
        )
    return index


class _Annotations:
    """Flat lists of all annotations, filled record by record."""

    def __init__(
        self, template: str | None, own_instructions: bool, processor: ImageProcessor | None
    ) -> None:
        self._template, self._own_instructions = template, own_instructions
        self._geometry = (
            None if processor is None else functools.lru_cache(2**14)(processor.geometry)
        )
        self._unnamed = 0
        # Index of each name or text, in the order of first appearance.
        self._class_ids: dict[str, int] = {}
        self._captions: dict[str, int] = {}
        self._own: dict[str, int] = {}
        self._templates: dict[str, str] = {}
        self._category: dict[int, int] = {}
        # One entry for every annotation.
        self._image: list[int] = []
        self._class_of: list[int] = []
        self._object: list[int] = []
        self._own_of: list[int] = []
        self._visible: list[bool] = []
        # Index pairs: annotation and caption; image and class.
        self._entry: list[tuple[int, int]] = []
        self._negative: list[tuple[int, int]] = []
        self._unsure: list[tuple[int, int]] = []

    def add(self, image: int, record: Record) -> None:
        """Adds a record; `image` is its index, above those added before."""
        own = self._instructions(record)
        visible = self._keeps(record)
        for k, one in enumerate(record.objects):
            if not one.name:
                self._unnamed += 1
                continue
            label = self._class_ids.setdefault(one.name, len(self._class_ids))
            if one.crowd:
                self._unsure.append((image, label))
                continue
            if one.category_id is not None:
                self._category.setdefault(label, one.category_id)
            self._add_captions(one.name, one.captions)
            self._image.append(image)
            self._class_of.append(label)
            self._object.append(k)
            self._own_of.append(own.get(k, -1))
            self._visible.append(bool(visible[k]))
        listed = (record.absent, self._negative), (record.not_exhaustive, self._unsure)
        for names, pairs in listed:
            for name in names:
                pairs.append((image, self._class_ids.setdefault(name, len(self._class_ids))))

    def _instructions(self, record: Record) -> dict[int, int]:
        """The first of the record's own instructions about each object that has any."""
        if not self._own_instructions:
            return {}
        return {
            one.target: self._own.setdefault(one.text, len(self._own))
            for one in reversed(record.instructions)
            if one.target is not None
        }

    def _add_captions(self, name: str, captions: Iterable[str]) -> None:
        """Adds the captions of the next annotation."""
        texts = [text for text in captions if text]
        if not texts and self._template is not None:
            if name not in self._templates:
                self._templates[name] = instruction_for(name, self._template)
            texts = [self._templates[name]]
        for text in texts:
            number = self._captions.setdefault(text, len(self._captions))
            self._entry.append((len(self._class_of), number))

    def index(self, images: int) -> ObjectIndex:
        """The index of a source with that many images."""
        annotated, order = len(set(self._class_of)), self._class_order()
        every = [*self._class_ids]
        names = tuple(every[k] for k in order)
        rank = np.argsort(order)
        image = np.array(self._image, np.int64)
        label = rank[np.array(self._class_of, np.int64)]
        labels = _Labels.build(
            (image, label),
            _ranked(self._negative, rank),
            _ranked(self._unsure, rank),
            (images, len(names)),
        )
        entry = np.array(self._entry, np.int64).reshape(-1, 2)
        visible = np.array(self._visible, bool)
        captioned = np.isin(np.arange(len(label)), entry[:, 0])
        used = visible & captioned & labels.lacking(annotated)[image]
        pairs = RaggedRows.distinct(image[used], label[used], labels.shape)
        pair_of = np.searchsorted(
            pairs.rows() * len(names) + pairs.values, image * len(names) + label
        )
        # In the order of the pairs, as the lists of captions are.
        entry = entry[used[entry[:, 0]]]
        entry = entry[np.argsort(pair_of[entry[:, 0]], kind="stable")]
        instructions = InstructionTable.build(names, tuple(self._own))
        own = np.append(instructions.own, -1)[np.array(self._own_of, np.int64)]
        return ObjectIndex(
            names=names,
            annotated=annotated,
            instructions=instructions,
            captions=tuple(self._captions),
            pairs=pairs,
            pair_images=pairs.rows().astype(np.int32),
            by_class=RaggedRows.build(pairs.values, np.arange(len(pairs.values)), len(names)),
            entries=RaggedRows.build(pair_of[entry[:, 0]], entry[:, 1], len(pairs.values)),
            entry_own=own[entry[:, 0]].astype(np.int32),
            entry_objects=np.array(self._object, np.int32)[entry[:, 0]],
            present=labels.present,
            excluded=labels.excluded,
            negative=labels.negative,
            together=_together(labels.present, len(names)),
            counts=Counts(
                images=int((pairs.counts() > 0).sum()),
                annotations=int(used.sum()),
                pairs=len(pairs.values),
                classes=len(np.unique(pairs.values)),
                cropped=int((~visible).sum()),
                uncaptioned=int((visible & ~captioned).sum()),
                never_absent=int((visible & captioned & ~used).sum()),
                unnamed=self._unnamed,
            ),
        )

    def _class_order(self) -> list[int]:
        """Class indices sorted: annotated ones first, then by category id or name."""
        seen, names = set(self._class_of), [*self._class_ids]
        numbered = all(label in self._category for label in seen)

        def key(label: int) -> tuple[bool, int, str]:
            number = self._category.get(label, 0) if numbered else 0
            return label not in seen, number, names[label]

        return sorted(range(len(names)), key=key)

    def _keeps(self, record: Record) -> Bool[np.ndarray, " n"]:
        """Mask of the objects that the model's image shows; all True if the image cannot be read,
        which the loader will report."""
        try:
            return objects_kept(record, self._geometry)
        except ImageError:
            return np.ones(len(record.objects), bool)


@dataclasses.dataclass(frozen=True, eq=False)
class _Labels:
    """Present, excluded and negative classes of each image; `shape` is (I, C)."""

    present: RaggedRows
    excluded: RaggedRows
    negative: RaggedRows
    shape: tuple[int, int]

    @classmethod
    def build(
        cls,
        annotated: tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]],
        negative: Int[np.ndarray, "_ 2"],
        unsure: Int[np.ndarray, "_ 2"],
        shape: tuple[int, int],
    ) -> _Labels:
        """Builds the lists from pairs (image, class): annotated, negative, and uncertain ones."""
        image, label = (
            np.concatenate([known, more]) for known, more in zip(annotated, unsure.T, strict=True)
        )
        excluded = RaggedRows.distinct(image, label, shape)
        listed = RaggedRows.distinct(negative[:, 0], negative[:, 1], shape)
        return cls(
            RaggedRows.distinct(*annotated, shape),
            excluded,
            listed.without(excluded, shape[1]),
            shape,
        )

    def lacking(self, annotated: int) -> Bool[np.ndarray, " I"]:
        """Mask of images that lack a class: a verified one, or an annotated one not excluded."""
        rows = self.excluded.rows()[self.excluded.values < annotated]
        taken = np.bincount(rows, minlength=len(self.excluded))
        return (self.negative.counts() > 0) | (taken < annotated)


def _ranked(pairs: list[tuple[int, int]], rank: Int[np.ndarray, " C"]) -> Int[np.ndarray, "_ 2"]:
    found = np.array(pairs, np.int64).reshape(-1, 2)
    found[:, 1] = rank[found[:, 1]]
    return found


def objects_kept(
    record: Record,
    geometry: Callable[[int, int], Geometry] | None,
    size: tuple[int, int] | None = None,
) -> Bool[np.ndarray, " n"]:
    """Mask of objects of which the processed image keeps at least half; True for those without box.

    Args:
      geometry: `ImageProcessor.geometry`; None for an image that is not cropped.
      size: width and height of the image, if known.

    Raises:
      ImageError: the record does not say its size, and the image cannot be read.
    """
    kept = np.ones(len(record.objects), bool)
    boxed = [k for k, one in enumerate(record.objects) if one.box is not None]
    if geometry is not None and boxed:
        size = size or record.size or images.read_size(record.image, name=record.id)
        boxes = np.array([record.objects[k].box for k in boxed], np.float64)
        kept[boxed] = geometry(*size).keeps(boxes)
    return kept


def _together(present: RaggedRows, classes: int) -> Int32[np.ndarray, "C C"]:
    """Number of images in which two classes are both annotated."""
    together = np.zeros(classes * classes, np.int32)
    counts = present.counts()
    for number in np.unique(counts[counts > 1]):
        rows = np.flatnonzero(counts == number)
        labels = present.values[present.starts[rows][:, None] + np.arange(number)].astype(np.int64)
        keys = (labels[:, :, None] * classes + labels[:, None, :])[:, ~np.eye(number, dtype=bool)]
        together += np.bincount(keys.ravel(), minlength=classes * classes).astype(np.int32)
    return together.reshape(classes, classes)
