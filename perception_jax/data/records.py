"""The record: what every source yields and every transform takes.

One vocabulary for scenes, image folders, COCO, LVIS, Parquet and TFDS, so that a system written
against records runs on any of them. Boxes are xyxy float pixels of the original image.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

Image = np.ndarray | bytes | pathlib.Path
"""uint8[H, W, 3], an encoded file's bytes, or a path; `data.images.decode` gives uint8 of each."""

Box = tuple[float, float, float, float]
"""xyxy, float pixels of the original image."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObjectAnnotation:
    """One object of an image.

    Attributes:
      name: display name of the class: the source's own in lower case with spaces, and nearer to it
        where two classes would otherwise share one; "" for a region without a class. Two objects
        are of one class if and only if their names are equal.
      raw_name: the source's own name of the class, verbatim, blank ones included; None takes
        `name`.
      box: xyxy float pixels, or None where the source has none.
      area: the object's own, pixels (of its mask, as COCO's "area"), or None where the source does
        not give it.
      mask: bool[H, W] of visible pixels, or None.
      caption: a sentence about this object alone, or "".
      attributes: e.g. {"colour": "red", "size": "tiny", "facing": "left"}.
      category_id: the source's own class id, or None.
      object_id: the source's own annotation id, or None.
      crowd: COCO's `iscrowd`.
    """

    name: str
    box: Box | None
    raw_name: str | None = None
    area: float | None = None
    mask: np.ndarray | None = None
    caption: str = ""
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    category_id: int | None = None
    object_id: int | str | None = None
    crowd: bool = False

    def __post_init__(self) -> None:
        if self.raw_name is None:
            object.__setattr__(self, "raw_name", self.name)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReferringExpression:
    """A phrase that is true of exactly one object: `objects[target]`."""

    text: str
    target: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with its answer; `options` is empty for open questions.

    `kind` names the question type (e.g. "count", "colour", "presence").
    """

    text: str
    answer: str
    options: tuple[str, ...] = ()
    kind: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """A request to attend to something; `target` indexes `objects`, None if it is absent."""

    text: str
    target: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One image with all that is known about it.

    Attributes:
      id: unique and stable within its source; appears in logs and errors.
      image: see `Image`.
      captions: sentences about the whole image.
      absent: class names known not to be in the image (LVIS's negatives).
      extras: anything else a source knows, never read by the library's shared parts.
    """

    id: str
    image: Image
    captions: tuple[str, ...] = ()
    objects: tuple[ObjectAnnotation, ...] = ()
    referring: tuple[ReferringExpression, ...] = ()
    questions: tuple[Question, ...] = ()
    instructions: tuple[Instruction, ...] = ()
    absent: tuple[str, ...] = ()
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MinimalPair:
    """Two images that differ in one visual pattern, after MMVP (arXiv 2401.06209, §2).

    Attributes:
      pattern: one of `MMVP_PATTERNS`.
      records: the two images.
      question: asked of both images; `answers[k]` is right for `records[k]` and they differ.
      options: the two answers in the order in which they are offered.
      statements: `statements[k]` is true of `records[k]` and false of the other.
    """

    id: str
    pattern: str
    records: tuple[Record, Record]
    question: str
    options: tuple[str, str]
    answers: tuple[str, str]
    statements: tuple[str, str]


MMVP_PATTERNS = (
    "orientation",
    "presence",
    "state",
    "count",
    "position",
    "colour",
    "structure",
    "text",
    "viewpoint",
)
"""The nine visual patterns in the paper's order (arXiv 2401.06209, §2)."""


@runtime_checkable
class Source(Protocol):
    """Random access to records; picklable, deterministic: the same index gives the same record."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> Record:
        """The record at `index`; raises `IndexError` outside [0, len)."""
