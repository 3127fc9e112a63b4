"""From the annotations of a source to an `ObjectIndex`.

A crowd is no object, but its class is not absent. Letters: N annotations, I images, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Bool, Int, Int32

from perception_jax.data import images
from perception_jax.data.geometry import Geometry
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record, Source
from perception_jax.data.skipping import MAX_BAD_FRACTION, Watch, sound_records
from perception_jax.errors import DataError, ImageError
from perception_jax.systems.give.data.instructions import InstructionTable, instruction_for
from perception_jax.systems.give.data.lists import Lists
from perception_jax.systems.give.data.object_index import Counts, ObjectIndex


def index_objects(
    source: Source,
    *,
    processor: ImageProcessor | None = None,
    template: str | None = None,
    own_instructions: bool = True,
    max_bad_fraction: float = MAX_BAD_FRACTION,
) -> ObjectIndex:
    """Reads every record of a source once; those that it cannot read have no objects here.

    Args:
      source: records with objects; images are not decoded.
      processor: what makes the model's image: objects of which its crop keeps less than half are
        left out (those near borders are what this system is about: a crop would silently turn them
        into errors). None keeps all.
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
            f"expected objects with captions, found {index.counts}. GiVE trains on objects that "
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
        # Numbers of what has a name or text, in the order of their first appearance.
        self._kinds: dict[str, int] = {}
        self._captions: dict[str, int] = {}
        self._own: dict[str, int] = {}
        self._templates: dict[str, str] = {}
        self._category: dict[int, int] = {}
        # One of each for every annotation.
        self._image: list[int] = []
        self._kind: list[int] = []
        self._object: list[int] = []
        self._own_of: list[int] = []
        self._visible: list[bool] = []
        # Pairs of numbers: annotation and caption; image and class.
        self._entry: list[tuple[int, int]] = []
        self._negative: list[tuple[int, int]] = []
        self._unsure: list[tuple[int, int]] = []

    def add(self, image: int, record: Record) -> None:
        """One record: the image of this number, above those before it."""
        own = self._instructions(record)
        visible = self._keeps(record)
        for k, one in enumerate(record.objects):
            if not one.name:
                self._unnamed += 1
                continue
            kind = self._kinds.setdefault(one.name, len(self._kinds))
            if one.crowd:
                self._unsure.append((image, kind))
                continue
            if one.category_id is not None:
                self._category.setdefault(kind, one.category_id)
            self._add_captions(one.name, one.captions)
            self._image.append(image)
            self._kind.append(kind)
            self._object.append(k)
            self._own_of.append(own.get(k, -1))
            self._visible.append(bool(visible[k]))
        listed = (record.absent, self._negative), (record.not_exhaustive, self._unsure)
        for names, pairs in listed:
            for name in names:
                pairs.append((image, self._kinds.setdefault(name, len(self._kinds))))

    def _instructions(self, record: Record) -> dict[int, int]:
        """The record's own, by the object that they are about; the first if there are several."""
        if not self._own_instructions:
            return {}
        return {
            one.target: self._own.setdefault(one.text, len(self._own))
            for one in reversed(record.instructions)
            if one.target is not None
        }

    def _add_captions(self, name: str, captions: Iterable[str]) -> None:
        """Captions of the annotation that comes next."""
        texts = [text for text in captions if text]
        if not texts and self._template is not None:
            if name not in self._templates:
                self._templates[name] = instruction_for(name, self._template)
            texts = [self._templates[name]]
        for text in texts:
            number = self._captions.setdefault(text, len(self._captions))
            self._entry.append((len(self._kind), number))

    def index(self, images: int) -> ObjectIndex:
        """All of it as arrays. `images`: how many the source has."""
        annotated, order = len(set(self._kind)), self._class_order()
        every = [*self._kinds]
        names = tuple(every[k] for k in order)
        rank = np.argsort(order)
        image = np.array(self._image, np.int64)
        kind = rank[np.array(self._kind, np.int64)]
        labels = _Labels.build(
            (image, kind),
            _ranked(self._negative, rank),
            _ranked(self._unsure, rank),
            (images, len(names)),
        )
        entry = np.array(self._entry, np.int64).reshape(-1, 2)
        usable = _Usable(
            visible=np.array(self._visible, bool),
            captioned=np.isin(np.arange(len(kind)), entry[:, 0]),
            lacking=labels.lacking(annotated)[image],
        )
        used = usable.used
        pairs = Lists.distinct(image[used], kind[used], labels.shape)
        pair_of = np.searchsorted(
            pairs.rows() * len(names) + pairs.values, image * len(names) + kind
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
            by_class=Lists.build(pairs.values, np.arange(len(pairs.values)), len(names)),
            entries=Lists.build(pair_of[entry[:, 0]], entry[:, 1], len(pairs.values)),
            entry_own=own[entry[:, 0]].astype(np.int32),
            entry_objects=np.array(self._object, np.int32)[entry[:, 0]],
            present=labels.present,
            excluded=labels.excluded,
            negative=labels.negative,
            together=_together(labels.present, len(names)),
            counts=dataclasses.replace(usable.counts(pairs), unnamed=self._unnamed),
        )

    def _class_order(self) -> list[int]:
        """Annotated classes first, then by category id or name: not by the records' order."""
        seen, names = set(self._kind), [*self._kinds]
        numbered = all(kind in self._category for kind in seen)

        def key(kind: int) -> tuple[bool, int, str]:
            number = self._category.get(kind, 0) if numbered else 0
            return kind not in seen, number, names[kind]

        return sorted(range(len(names)), key=key)

    def _keeps(self, record: Record) -> Bool[np.ndarray, " n"]:
        """Which objects the model's image shows; all if the image cannot be read, which the loader
        will report."""
        try:
            return objects_kept(record, self._geometry)
        except ImageError:
            return np.ones(len(record.objects), bool)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Usable:
    """Which annotations the crop shows, have a caption, are in an image that lacks a class."""

    visible: Bool[np.ndarray, " N"]
    captioned: Bool[np.ndarray, " N"]
    lacking: Bool[np.ndarray, " N"]

    @property
    def used(self) -> Bool[np.ndarray, " N"]:
        return self.visible & self.captioned & self.lacking

    def counts(self, pairs: Lists) -> Counts:
        return Counts(
            images=int((pairs.counts() > 0).sum()),
            annotations=int(self.used.sum()),
            pairs=len(pairs.values),
            classes=len(np.unique(pairs.values)),
            cropped=int((~self.visible).sum()),
            uncaptioned=int((self.visible & ~self.captioned).sum()),
            never_absent=int((self.visible & self.captioned & ~self.lacking).sum()),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Labels:
    """What is known of each image's classes; see `ObjectIndex`. `shape`: images and classes."""

    present: Lists
    excluded: Lists
    negative: Lists
    shape: tuple[int, int]

    @classmethod
    def build(
        cls,
        annotated: tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"]],
        negative: Int[np.ndarray, "_ 2"],
        unsure: Int[np.ndarray, "_ 2"],
        shape: tuple[int, int],
    ) -> _Labels:
        """Of image and class of each annotation, negative, and class that one cannot be sure of."""
        image, kind = (
            np.concatenate([known, more]) for known, more in zip(annotated, unsure.T, strict=True)
        )
        excluded = Lists.distinct(image, kind, shape)
        listed = Lists.distinct(negative[:, 0], negative[:, 1], shape)
        return cls(
            Lists.distinct(*annotated, shape), excluded, listed.without(excluded, shape[1]), shape
        )

    def lacking(self, annotated: int) -> Bool[np.ndarray, " I"]:
        """Images that lack a class: a verified one, or one of the annotated not excluded."""
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
    """Which objects keep at least half of their box in the processed image; those without one do.

    Args:
      geometry: `ImageProcessor.geometry`; None for an image that is not cut.
      size: width and height of the image, where the caller knows them.

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


def _together(present: Lists, classes: int) -> Int32[np.ndarray, "C C"]:
    """In how many images two classes are both annotated."""
    together = np.zeros(classes * classes, np.int32)
    counts = present.counts()
    for number in np.unique(counts[counts > 1]):
        rows = np.flatnonzero(counts == number)
        kinds = present.values[present.starts[rows][:, None] + np.arange(number)].astype(np.int64)
        keys = (kinds[:, :, None] * classes + kinds[:, None, :])[:, ~np.eye(number, dtype=bool)]
        together += np.bincount(keys.ravel(), minlength=classes * classes).astype(np.int32)
    return together.reshape(classes, classes)
