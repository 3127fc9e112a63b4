"""Records: the output of every source and the input of every transform.

One vocabulary for scenes, image folders, COCO, LVIS, question answering and conversations, so that
a system written against records runs on any of them. Boxes are xyxy float pixels of the original
image.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from perception_jax.errors import DataError

Image = np.ndarray | bytes | pathlib.Path
"""An image of a record: uint8[H, W, 3], the bytes of an encoded file, or a path."""

Box = tuple[float, float, float, float]
"""A box as xyxy float pixels of the original image."""


Role = Literal["system", "user", "assistant"]
"""The speaker of a turn in a conversation."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObjectAnnotation:
    """One annotated object of an image.

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
      captions: sentences about this object alone.
      attributes: e.g. {"colour": "red", "size": "tiny", "facing": "left"}.
      salient: whether it is the image's most prominent object, or None where the source does not
        say.
      category_id: the source's own class id, or None.
      object_id: the source's own annotation id, or None.
      crowd: COCO's `iscrowd`.
    """

    name: str
    box: Box | None
    raw_name: str | None = None
    area: float | None = None
    mask: np.ndarray | None = None
    captions: tuple[str, ...] = ()
    attributes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    salient: bool | None = None
    category_id: int | None = None
    object_id: int | str | None = None
    crowd: bool = False

    def __post_init__(self) -> None:
        if self.raw_name is None:
            object.__setattr__(self, "raw_name", self.name)

    @property
    def caption(self) -> str:
        """The first caption, or ""."""
        return self.captions[0] if self.captions else ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReferringExpression:
    """A phrase that is true of exactly one object: `objects[target]`."""

    text: str
    target: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with its accepted answers.

    Attributes:
      answers: at least one; the first is the one to train on. VQA and TextVQA give ten, of which
        several may be equal.
      options: what a multiple-choice question offers; () for an open question.
      kind: the question's type (e.g. "count", "colour", "presence"), or "".
      question_id: the source's own id, or None.

    Raises:
      DataError: no answer.
    """

    text: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    kind: str = ""
    question_id: int | str | None = None

    def __post_init__(self) -> None:
        if not self.answers:
            raise DataError(f"question {self.text!r}: expected at least one answer, found none.")

    @property
    def answer(self) -> str:
        """The first answer."""
        return self.answers[0]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInstruction:
    """An instruction that refers to `objects[target]`, or to an absent object (`target` None)."""

    text: str
    target: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn of a conversation.

    Attributes:
      text: verbatim, with the source's placeholders of images and boxes (LLaVA's "<image>").
      targets: the objects that its placeholders of boxes stand for, in order; indices of
        `Record.objects`.
    """

    role: Role
    text: str
    targets: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One example: an image with its annotations, or a text with any number of images.

    Attributes:
      id: unique and stable within its source; appears in logs and errors.
      images: one for most sources, () for a text-only record; see `Image`. Code that needs exactly
        one takes `image`.
      size: width and height of the image as shown, pixels, or None where the source does not say.
      image_id: the source's own id of the image, or None.
      class_name: display name of the class of the whole image, or "" (see `ObjectAnnotation.name`).
      raw_class_name: the source's own name of that class, verbatim; None takes `class_name`.
      captions: sentences about the whole image.
      objects: of the image.
      conversation: turns, in order.
      text: a passage to read or to learn, of a record without images.
      absent: class names known not to be in the image (LVIS's negatives).
      not_exhaustive: class names of which the image may have objects without an annotation: nothing
        follows from their absence (LVIS).
      extras: anything else a source knows, never read by the library's shared parts.

    Raises:
      DataError: objects or a size, but not exactly one image that they belong to.
    """

    id: str
    images: tuple[Image, ...] = ()
    size: tuple[int, int] | None = None
    image_id: int | str | None = None
    class_name: str = ""
    raw_class_name: str | None = None
    captions: tuple[str, ...] = ()
    objects: tuple[ObjectAnnotation, ...] = ()
    referring: tuple[ReferringExpression, ...] = ()
    questions: tuple[Question, ...] = ()
    instructions: tuple[ObjectInstruction, ...] = ()
    conversation: tuple[Turn, ...] = ()
    text: str = ""
    absent: tuple[str, ...] = ()
    not_exhaustive: tuple[str, ...] = ()
    extras: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.raw_class_name is None:
            object.__setattr__(self, "raw_class_name", self.class_name)
        if (self.objects or self.size) and len(self.images) != 1:
            raise DataError(
                f"record {self.id!r}: expected one image for its objects and size, found "
                f"{len(self.images)}. Make one record of each annotated image."
            )

    @property
    def image(self) -> Image:
        """The only image.

        Raises:
          DataError: a text-only record, or several images.
        """
        if len(self.images) != 1:
            found = f"{len(self.images)} images" if self.images else "a text-only record"
            raise DataError(
                f"record {self.id!r}: expected exactly one image, found {found}. Leave such "
                "records out, or use a transform that reads `Record.images`."
            )
        return self.images[0]


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
