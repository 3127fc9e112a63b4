"""Folds one instruction's gallery after another into what the scores are made of.

Conditioned embeddings of all images under all instructions would not fit anywhere. Each gallery is
visited once, in any order, and only ranks, precisions, cosines with the class prototypes, presence
logits and the embeddings of the pairs stay. Deciding asks about every class by the instruction made
from its name, present or not; naming and retrieval use a record's own instruction where it has one.
Letters: N images, C classes, K captions, n images of a gallery, d width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Float32, Int, Real

from perception_jax.errors import DataError
from perception_jax.evals.conditioned import retrieval
from perception_jax.evals.conditioned.annotations import UNKNOWN, Annotations
from perception_jax.evals.conditioned.retrieval import (
    SYSTEMS,
    TWO_STAGE,
    Gallery,
    Outcomes,
    PairQueries,
)
from perception_jax.evals.ranking import similarity, unit_rows

TOP = 100
"""Images that the second stage of two-stage retrieval looks at."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TextEmbeddings:
    """Unit text embeddings.

    Attributes:
      prototypes: of each class; see `prompts.prototypes`.
      captions: in the order of `Annotations.captions`.
    """

    prototypes: Float[np.ndarray, "C d"]
    captions: Float[np.ndarray, "K d"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """All that the scores need; see `results.results`.

    Entries of pairs that no score looks at may be NaN.

    Attributes:
      presence: presence logit of each image under each class's instruction.
      cosine: `<v(x|u_c), prototype_c>`.
      static: `<v(x), prototype_c>`.
      blank: `<v(blank|u_c), prototype_c>`.
      blank_presence: presence logit of the blank image under each class's instruction; NaN where
        none was given.
      naming: per system, outcomes of all pairs among the prototypes.
      tasks: retrieval task, then system: "text_to_image" (of captions, where there are any),
        "image_to_text", "same_class" (of pairs, where there are captions) and "image_to_image" (of
        pairs). Empty if retrieval was left out.
      top: of two-stage retrieval.
    """

    annotations: Annotations
    presence: Float32[np.ndarray, "N C"]
    cosine: Float32[np.ndarray, "N C"]
    static: Float32[np.ndarray, "N C"]
    blank: Float32[np.ndarray, " C"]
    blank_presence: Float32[np.ndarray, " C"]
    naming: Mapping[str, Outcomes]
    tasks: Mapping[str, Mapping[str, Outcomes]]
    top: int

    @property
    def calibrated(self) -> Float32[np.ndarray, "N C"]:
        """Cosine with the prototype, less what the instruction alone gives."""
        return self.cosine - self.blank

    @property
    def deciding(self) -> dict[str, Float32[np.ndarray, "N C"]]:
        """Every score of a candidate, by system; "blank" where its presence logits were given."""
        found = {
            "presence": self.presence,
            "calibrated_cosine": self.calibrated,
            "static": self.static,
        }
        if not np.isnan(self.blank_presence).all():
            found["blank"] = np.broadcast_to(self.blank_presence, self.presence.shape)
        return found


class Needs:
    """Which images have to be conditioned on which instruction, and for what.

    Attributes:
      classes, pairs, captions: indices per instruction, ascending.
      images: images per instruction, ascending; a gallery without any is never made.
    """

    def __init__(self, annotations: Annotations, *, retrieval: bool = True):
        """Args: retrieval: without it, only naming and classification are scored."""
        count = len(annotations.instructions)
        pairs, captions = annotations.pairs, annotations.captions
        self.classes = _by_instruction(annotations.class_instruction, count)
        self.pairs = _by_instruction(pairs.instruction, count)
        self.captions = _by_instruction(captions.instruction, count)
        self.images = []
        known = np.ascontiguousarray(annotations.labels.T) != UNKNOWN
        for number in range(count):
            mine, kinds = self.pairs[number], self.classes[number]
            if retrieval:  # every image that a pair's class is known of is in its gallery
                kinds = np.union1d(kinds, pairs.class_id[mine])
            needed = known[kinds].any(axis=0)
            needed[pairs.image[mine]] = True
            needed |= retrieval and len(self.captions[number]) > 0
            self.images.append(np.flatnonzero(needed))

    @property
    def made(self) -> Int[np.ndarray, " u"]:
        """Instructions with a gallery, ascending."""
        return np.flatnonzero([len(images) for images in self.images])


class Accumulator:
    """Takes the galleries of all instructions that need one, then gives `Measured`."""

    def __init__(
        self,
        annotations: Annotations,
        texts: TextEmbeddings,
        static: Float[np.ndarray, "N d"],
        *,
        retrieval: bool = True,
        top: int = TOP,
    ):
        """Args:
          static: embeddings of all images without an instruction.
          retrieval: whether to score retrieval.
          top: of two-stage retrieval.

        Raises:
          DataError: numbers of rows that do not fit, or a row that is zero or not finite.
        """
        _expect_rows(texts.prototypes, len(annotations.classes), "prototypes")
        _expect_rows(texts.captions, len(annotations.captions.texts), "captions")
        _expect_rows(static, annotations.count, "static images")
        self.annotations = annotations
        self.needs = Needs(annotations, retrieval=retrieval)
        self._prototypes = _unit(texts.prototypes, "prototypes")
        self._captions = _unit(texts.captions, "captions") if len(texts.captions) else None
        self._static = _unit(static, "static images")
        self._open = set(self.needs.made.tolist())
        self._top = top
        shape = annotations.labels.shape
        self._presence = np.full(shape, np.nan, np.float32)
        self._cosine = np.full(shape, np.nan, np.float32)
        self._blank, self._blank_presence = np.full((2, shape[1]), np.nan, np.float32)
        width = static.shape[1]
        self._asked = np.zeros((len(annotations.pairs.image), width), np.float32)
        self._asked_blank = np.zeros((len(annotations.instructions), width), np.float32)
        self._tasks = self._empty_tasks() if retrieval else {}

    def add(
        self,
        instruction: int,
        images: Int[np.ndarray, " n"],
        embeddings: Float[np.ndarray, "n d"],
        presence: Real[np.ndarray, " n"],
        blank: Float[np.ndarray, " d"],
        blank_presence: float | None = None,
    ) -> None:
        """Takes the gallery of one instruction.

        Args:
          instruction: index into `Annotations.instructions`; each once.
          images: ascending; at least those that the instruction needs.
          embeddings: conditioned on the instruction; any lengths.
          presence: presence logits.
          blank: the embedding of the blank image under the instruction.
          blank_presence: its presence logit; without it the floor of deciding is not scored.

        Raises:
          DataError: an instruction that was not asked for or came before, images that are missing,
            or a row that is zero or not finite.
        """
        self._check(instruction, images, presence)
        gallery = Gallery(
            images=images,
            conditioned=_unit(embeddings, f"gallery {instruction}"),
            static=self._static[images],
            blank=_unit(blank[None], f"blank image of gallery {instruction}"),
        )
        for kind in self.needs.classes[instruction]:
            prototype = self._prototypes[kind][None]
            self._presence[images, kind] = presence
            self._cosine[images, kind] = similarity(gallery.conditioned, prototype)[:, 0]
            self._blank[kind] = similarity(gallery.blank, prototype)[0, 0]
            if blank_presence is not None:
                self._blank_presence[kind] = blank_presence
        pairs = self.needs.pairs[instruction]
        own = gallery.rows(self.annotations.pairs.image[pairs])
        self._asked[pairs] = gallery.conditioned[own]
        self._asked_blank[instruction] = gallery.blank[0]
        if self._tasks:
            self._retrieve(pairs, self.needs.captions[instruction], gallery)
        self._open.discard(instruction)

    def finish(self) -> Measured:
        """What was measured; ranks the texts for all pairs.

        Raises:
          DataError: a gallery is missing.
        """
        if self._open:
            names = [self.annotations.instructions[k] for k in sorted(self._open)[:3]]
            raise DataError(
                f"expected the gallery of every instruction, {len(self._open)} are missing (first: "
                f"{names}); add them before the scores are asked for"
            )
        notes, tasks, pairs = self.annotations, self._tasks, self.annotations.pairs
        queries = {
            "conditioned": PairQueries(self._asked, np.arange(len(self._asked))),
            "static": PairQueries(self._static, pairs.image),
            "blank": PairQueries(self._asked_blank, pairs.instruction),
        }
        naming = _outcomes(SYSTEMS, len(pairs.image))
        retrieval.name_pairs(notes, queries, self._prototypes, naming)
        if "image_to_text" in tasks:
            found = tasks["image_to_text"], tasks["same_class"]
            retrieval.image_to_text(notes, queries, self._captions, *found)
        return Measured(
            annotations=self.annotations,
            presence=self._presence,
            cosine=self._cosine,
            static=similarity(self._static, self._prototypes),
            blank=self._blank,
            blank_presence=self._blank_presence,
            naming=naming,
            tasks=tasks,
            top=self._top,
        )

    def _retrieve(self, pairs: np.ndarray, captions: np.ndarray, gallery: Gallery) -> None:
        notes, tasks, top = self.annotations, self._tasks, self._top
        retrieval.image_to_image(notes, pairs, gallery, tasks["image_to_image"], top=top)
        if len(captions):
            into = tasks["text_to_image"]
            retrieval.text_to_image(notes, captions, gallery, self._captions, into, top=top)

    def _empty_tasks(self) -> dict[str, dict[str, Outcomes]]:
        pairs, staged = len(self.annotations.pairs.image), (*SYSTEMS, TWO_STAGE)
        tasks = {"image_to_image": _outcomes(staged, pairs)}
        if self._captions is not None:
            tasks["text_to_image"] = _outcomes(staged, len(self._captions))
            tasks["image_to_text"] = _outcomes(SYSTEMS, pairs)
            tasks["same_class"] = _outcomes(SYSTEMS, pairs)
        return tasks

    def _check(self, instruction: int, images: np.ndarray, presence: np.ndarray) -> None:
        if instruction not in self._open:
            raise DataError(
                f"expected one of the {len(self._open)} instructions whose gallery is missing, "
                f"found number {instruction}; see Needs.made"
            )
        missing = np.setdiff1d(self.needs.images[instruction], images)
        if len(missing) or np.any(np.diff(images) <= 0):
            raise DataError(
                f"gallery {instruction}: expected distinct images in ascending order, among them "
                f"all that Needs names; {len(missing)} of those are missing"
            )
        if not np.isfinite(presence).all():
            raise DataError(
                f"gallery {instruction}: expected finite presence logits, found "
                f"{int((~np.isfinite(presence)).sum())} that are not; check the model's output"
            )


def _unit(rows: np.ndarray, name: str) -> np.ndarray:
    return unit_rows(rows, name).astype(np.float64)


def _outcomes(systems: tuple[str, ...], queries: int) -> dict[str, Outcomes]:
    return {system: Outcomes.empty(queries) for system in systems}


def _by_instruction(instruction: np.ndarray, count: int) -> list[np.ndarray]:
    order = np.argsort(instruction, kind="stable")
    return np.split(order, np.searchsorted(instruction[order], np.arange(1, count)))


def _expect_rows(rows: np.ndarray, count: int, name: str) -> None:
    if len(rows) != count:
        raise DataError(f"expected {count} {name}, one row each, found {len(rows)} rows")
