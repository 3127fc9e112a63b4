"""What a training set shows, without its pixels: which classes each image has, lacks, may have.

The sampler works on this alone; `annotations.index_objects` makes it of a source. A class is a
name.

Letters: I images (records of the source), P pairs of an image and a class that it shows, E entries
(the captions of a pair's objects), C classes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int32

from perception_jax.systems.give.data.instructions import InstructionTable
from perception_jax.systems.give.data.lists import Lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
    """What an index holds, and what it left out.

    Attributes:
      images: with at least one usable object.
      annotations: usable objects; `pairs`: different classes of images among them.
      classes: of the pairs.
      cropped: objects of which the crop leaves less than half.
      uncaptioned: objects without a caption, of the others.
      never_absent: objects of images for which no class is known to be absent, of the others.
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
    """Attributes:
    names: of the classes. The first `annotated` of them have an object somewhere; the others are
      only spoken of as absent.
    instructions: of these classes, and the records' own.
    captions: all different ones.
    pairs: the classes of each image; a pair's number is its place in `pairs.values`.
    pair_images: the image of each pair.
    by_class: the pairs of each class, ascending.
    entries: the captions of each pair, those of each of its objects.
    entry_own: instruction of the entry's object, or -1; `entry_objects`: its place in the record.
    present: classes annotated in each image, those of unusable objects included.
    excluded: annotated or not exhaustively annotated in an image: never absent; ascending.
    negative: verified absent from an image.
    together: number of images in which two classes are annotated.
    """

    names: tuple[str, ...]
    annotated: int
    instructions: InstructionTable
    captions: tuple[str, ...]
    pairs: Lists
    pair_images: Int32[np.ndarray, " P"]
    by_class: Lists
    entries: Lists
    entry_own: Int32[np.ndarray, " E"]
    entry_objects: Int32[np.ndarray, " E"]
    present: Lists
    excluded: Lists
    negative: Lists
    together: Int32[np.ndarray, "C C"]
    counts: Counts
