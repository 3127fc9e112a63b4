"""Naming and retrieval with images that are conditioned on what is looked for.

A gallery is what one instruction made of the images; it is ranked for the queries of that
instruction. Texts are ranked for the queries of all. Systems that are compared: "conditioned";
"static", the same backbone without an instruction; "two_stage", the best by static features
reordered by conditioned ones; "blank", an image of the mean colour in the place of the query image,
in text-to-image of every gallery image.
Letters: m queries, n images of a gallery, P pairs, C classes, K captions, v vectors, d width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Float, Float64, Int

from perception_jax.evals import ranking
from perception_jax.evals.conditioned.annotations import PRESENT, UNKNOWN, Annotations

SYSTEMS = ("conditioned", "static", "blank")
TWO_STAGE = "two_stage"

Scorer = Callable[[np.ndarray], np.ndarray]
"""Takes which items take part, bool[#m, n], gives scores float32[m, n]."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Gallery:
    """Images under one instruction, as unit vectors; float64, since they are multiplied often.

    Attributes:
      images: which they are, ascending.
      conditioned: with the instruction.
      static: without.
      blank: the blank image with the instruction.
    """

    images: Int[np.ndarray, " n"]
    conditioned: Float64[np.ndarray, "n d"]
    static: Float64[np.ndarray, "n d"]
    blank: Float64[np.ndarray, "1 d"]

    def rows(self, images: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
        """Where some of the images stand."""
        return np.searchsorted(self.images, images)


@dataclasses.dataclass(frozen=True, eq=False)
class PairQueries:
    """The query vector of each pair: `vectors[which]`."""

    vectors: Float[np.ndarray, "v d"]
    which: Int[np.ndarray, " P"]


@dataclasses.dataclass(frozen=True, eq=False)
class Outcomes:
    """How each query fared.

    Attributes:
      first: rank of the first relevant item, 0 for a query that is skipped.
      precision: average precision, NaN for a query that is skipped or where a task has none.
    """

    first: Int[np.ndarray, " q"]
    precision: Float[np.ndarray, " q"]

    @classmethod
    def empty(cls, queries: int) -> Outcomes:
        """All skipped."""
        return cls(np.zeros(queries, np.int64), np.full(queries, np.nan))


def name_pairs(
    annotations: Annotations,
    queries: Mapping[str, PairQueries],
    prototypes: Float64[np.ndarray, "C d"],
    into: Mapping[str, Outcomes],
) -> None:
    """Ranks all class prototypes for each (image, present class), whose class is the right one."""
    for system, rows, scores in _text_scores(queries, prototypes):
        right = np.arange(len(prototypes)) == annotations.pairs.class_id[rows, None]
        into[system].first[rows] = ranking.first_ranks(scores, right)


def image_to_text(
    annotations: Annotations,
    queries: Mapping[str, PairQueries],
    captions: Float64[np.ndarray, "K d"],
    into: Mapping[str, Outcomes],
    same_class: Mapping[str, Outcomes],
) -> None:
    """Ranks all captions, and those of the same class alone, for each (image, present class).

    Right are the captions of all objects of that class in that image.
    """
    owner, kinds = annotations.captions.pair, annotations.pairs.class_id
    for system, rows, scores in _text_scores(queries, captions):
        right = owner == rows[:, None]
        same = kinds[owner] == kinds[rows, None]
        into[system].first[rows] = ranking.first_ranks(scores, right)
        same_class[system].first[rows] = ranking.first_ranks(scores, right, same)


def text_to_image(
    annotations: Annotations,
    captions: Int[np.ndarray, " m"],
    gallery: Gallery,
    texts: Float64[np.ndarray, "K d"],
    into: Mapping[str, Outcomes],
    *,
    top: int,
) -> None:
    """Ranks all images for each caption.

    The first rank is that of the caption's own image among all. The precision is over every image
    with the caption's class; images of which nothing is known about it take no part.
    """
    for rows in _blocks(captions, len(gallery.images)):
        pairs = annotations.captions.pair[rows]
        own = gallery.images == annotations.pairs.image[pairs, None]
        labels = annotations.labels.T[annotations.pairs.class_id[pairs]]
        known, everything = labels != UNKNOWN, np.ones_like(own)
        static = ranking.similarity(texts[rows], gallery.static)
        conditioned = ranking.similarity(texts[rows], gallery.conditioned)
        blank = np.zeros_like(static)
        for system, scorer in _scorers(conditioned, static, blank, top).items():
            found = ranking.relevant_ranks(scorer(known), labels == PRESENT, known)
            into[system].precision[rows] = found.average_precision()
            into[system].first[rows] = ranking.first_ranks(scorer(everything), own)


def image_to_image(
    annotations: Annotations,
    pairs: Int[np.ndarray, " m"],
    gallery: Gallery,
    into: Mapping[str, Outcomes],
    *,
    top: int,
) -> None:
    """Ranks all other images for each (image, present class); right are images with that class.

    Images of which nothing is known about the class take no part.
    """
    for rows in _blocks(pairs, len(gallery.images)):
        images = annotations.pairs.image[rows]
        labels = annotations.labels[gallery.images][:, annotations.pairs.class_id[rows]].T
        allowed = (labels != UNKNOWN) & (gallery.images != images[:, None])
        own = gallery.rows(images)
        static = ranking.similarity(gallery.static[own], gallery.static)
        conditioned = ranking.similarity(gallery.conditioned[own], gallery.conditioned)
        blank = ranking.similarity(gallery.blank, gallery.conditioned)
        blank = np.broadcast_to(blank, conditioned.shape)
        for system, scorer in _scorers(conditioned, static, blank, top).items():
            found = ranking.relevant_ranks(scorer(allowed), labels == PRESENT, allowed)
            into[system].precision[rows] = found.average_precision()
            into[system].first[rows] = found.first()


def _text_scores(
    queries: Mapping[str, PairQueries], texts: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """System, pairs and their scores, in blocks; pairs with the same vector side by side."""
    for system, asked in queries.items():
        for rows in _blocks(np.argsort(asked.which, kind="stable"), len(texts)):
            distinct, place = np.unique(asked.which[rows], return_inverse=True)
            yield system, rows, ranking.similarity(asked.vectors[distinct], texts)[place]


def _scorers(
    conditioned: np.ndarray, static: np.ndarray, blank: np.ndarray, top: int
) -> dict[str, Scorer]:
    return {
        "conditioned": lambda allowed: conditioned,
        "static": lambda allowed: static,
        "blank": lambda allowed: blank,
        TWO_STAGE: lambda allowed: ranking.two_stage(static, conditioned, allowed, top),
    }


def _blocks(queries: np.ndarray, gallery: int) -> Iterator[np.ndarray]:
    for block in ranking.blocks(len(queries), gallery):
        yield queries[block]
