"""Image-text retrieval in both directions, with any number of right items per query.

Recall@k is the share of queries with at least one right item among the first k, as on Flickr30k
and COCO (arXiv 1412.2306, §4.1). Letters: i images, t texts, p pairs, d width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Integer

from perception_jax.errors import DataError
from perception_jax.evals import ranking
from perception_jax.evals.baselines import chance_recall
from perception_jax.evals.intervals import bootstrap_interval, wilson_interval


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionScores:
    """Scores of one direction.

    Attributes:
      recall: k to recall@k, a fraction.
      recall_interval: k to its 95 % Wilson interval.
      chance_recall: k to the expected recall@k of a random order.
      median_rank: median of `ranks` over queries that have a right item.
      median_rank_interval: its 95 % bootstrap interval.
      ranks: rank of each query's best right item among the wrong ones, 1 is best; 0 for an item
        without a pair, which is no query.
      queries: number of queries that count.
    """

    recall: Mapping[int, float]
    recall_interval: Mapping[int, tuple[float, float]]
    chance_recall: Mapping[int, float]
    median_rank: float
    median_rank_interval: tuple[float, float]
    ranks: Int[np.ndarray, " q"]
    queries: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Both directions of a retrieval benchmark."""

    image_to_text: DirectionScores
    text_to_image: DirectionScores


def retrieval(
    image_embeddings: Float[np.ndarray, "i d"],
    text_embeddings: Float[np.ndarray, "t d"],
    pairs: Integer[np.ndarray, "p 2"],
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> RetrievalScores:
    """Scores image to text and text to image by cosine similarity.

    Ties go against the model (see `ranking.positive_ranks`), so the order of a gallery does not
    matter. An image or text without a pair is a distractor: it stays in the gallery of the other
    direction and is no query of its own. Never holds all i x t scores.

    Args:
      image_embeddings, text_embeddings: any lengths.
      pairs: (image, text) index of each right pair, in any order, many to many.
      ks: cut-offs of recall.

    Raises:
      DataError: an embedding is zero or not finite, widths differ, no pairs, an index that is out
        of range or no integer, or a cut-off below 1.
    """
    ranking.check_widths(image_embeddings, text_embeddings, "image and text")
    images = ranking.unit_rows(image_embeddings, "image embeddings")
    texts = ranking.unit_rows(text_embeddings, "text embeddings")
    check_pairs(pairs, len(images), len(texts))
    if any(k < 1 for k in ks):
        raise DataError(f"expected cut-offs of 1 or more, found ks = {tuple(ks)}")
    pairs = np.unique(pairs.astype(np.int64), axis=0)
    return RetrievalScores(
        image_to_text=_direction(images, texts, pairs, ks),
        text_to_image=_direction(texts, images, pairs[:, ::-1], ks),
    )


def _direction(
    queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray, ks: Sequence[int]
) -> DirectionScores:
    ranks = ranking.positive_ranks(queries, gallery, pairs)
    counted = ranks[ranks > 0]
    rights = np.bincount(pairs[:, 0], minlength=len(queries))
    rights = rights[rights > 0]
    hits = {k: int((counted <= k).sum()) for k in ks}
    return DirectionScores(
        recall={k: hits[k] / len(counted) for k in ks},
        recall_interval={k: wilson_interval(hits[k], len(counted)) for k in ks},
        chance_recall={k: chance_recall(rights, len(gallery), k) for k in ks},
        median_rank=float(np.median(counted)),
        median_rank_interval=bootstrap_interval(counted.astype(np.float64), np.median),
        ranks=ranks,
        queries=len(counted),
    )


def check_pairs(pairs: np.ndarray, images: int, texts: int) -> None:
    """Raises `DataError` unless pairs are (image, text) indices in range, at least one."""
    if pairs.ndim != 2 or pairs.shape[-1] != 2 or len(pairs) == 0:
        raise DataError(
            f"expected at least one (image, text) index pair, found pairs of shape {pairs.shape}"
        )
    if not np.issubdtype(pairs.dtype, np.integer):
        raise DataError(f"expected pairs of integers, found an array of {pairs.dtype}")
    outside = (pairs < 0) | (pairs >= np.array([images, texts]))
    if outside.any():
        row = int(np.argmax(outside.any(axis=1)))
        raise DataError(
            f"expected pairs of indices below ({images}, {texts}), found "
            f"({int(pairs[row, 0])}, {int(pairs[row, 1])}) in row {row} of pairs; the order is "
            "(image, text)"
        )
