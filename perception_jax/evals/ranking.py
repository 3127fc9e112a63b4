"""Ranks of the right items of a gallery by cosine similarity, in blocks.

Shared by zero-shot classification (one right class) and retrieval (any number of right items).
Letters: q queries, g gallery, d width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int, Integer

from perception_jax.errors import DataError

TIE = 1e-6
"""Cosines closer than this count as equal: float32 products differ by less between two layouts of
the same vectors, and a rank must not depend on the layout."""

_BLOCK_SCORES = 1 << 22


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The nearest items of a gallery, best first: `indices` [q, k] and their cosines `scores`."""

    indices: Int[np.ndarray, "q k"]
    scores: Float[np.ndarray, "q k"]


def unit_rows(embeddings: np.ndarray, name: str) -> np.ndarray:
    """Rows scaled to length 1, float32.

    Raises:
      DataError: not a matrix, or a row is zero or not finite.
    """
    if embeddings.ndim != 2 or embeddings.size == 0:
        raise DataError(
            f"expected {name} as a non-empty matrix of one embedding per row, found shape "
            f"{embeddings.shape}"
        )
    # Lengths in float64: squares of large float32 numbers overflow.
    wide = np.asarray(embeddings, np.float64)
    lengths = np.linalg.norm(wide, axis=-1)
    bad = ~(np.isfinite(lengths) & (lengths > 0))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(
            f"expected finite non-zero embeddings, found length {lengths[row]} in row {row} of "
            f"{name} ({int(bad.sum())} such rows); check the model's output"
        )
    return (wide / lengths[:, None]).astype(np.float32)


def check_widths(first: np.ndarray, second: np.ndarray, names: str) -> None:
    """Raises `DataError` unless both matrices have the same width."""
    if first.shape[-1] != second.shape[-1]:
        raise DataError(
            f"expected {names} embeddings of one width, found {first.shape[-1]} and "
            f"{second.shape[-1]}; embed both with the same model, after its projections"
        )


def blocks(queries: int, gallery: int) -> Iterator[slice]:
    """Slices of queries whose scores against the whole gallery take some 16 MB."""
    rows = max(1, _BLOCK_SCORES // max(1, gallery))
    for start in range(0, queries, rows):
        yield slice(start, min(start + rows, queries))


def positive_ranks(
    queries: Float[np.ndarray, "q d"],
    gallery: Float[np.ndarray, "g d"],
    pairs: Integer[np.ndarray, "p 2"],
) -> Int[np.ndarray, " q"]:
    """Rank (1 is best) of each query's best right item among the wrong ones.

    Ties go against the model: a wrong item whose cosine is within `TIE` of the best right one's
    counts as ahead. A model that gives every item the same embedding therefore ranks last, not
    first. Right items never count against each other.

    Args:
      queries, gallery: unit rows.
      pairs: distinct (query, gallery item), one row for each right pair.

    Returns:
      Ranks; 0 for a query without a right item.
    """
    order = np.argsort(pairs[:, 0], kind="stable")
    owners, items = pairs[order, 0], pairs[order, 1]
    ranks = np.zeros(len(queries), np.int64)
    for block in blocks(len(queries), len(gallery)):
        mine = slice(*np.searchsorted(owners, [block.start, block.stop]))
        if mine.start == mine.stop:
            continue
        scores = queries[block] @ gallery.T
        rows, starts = np.unique(owners[mine] - block.start, return_index=True)
        right = scores[owners[mine] - block.start, items[mine]]
        limits = np.full(len(scores), np.inf, scores.dtype)
        limits[rows] = np.maximum.reduceat(right, starts) - TIE
        ahead = np.count_nonzero(scores >= limits[:, None], axis=1)[rows]
        tied = (right >= limits[owners[mine] - block.start]).astype(np.int64)
        right_ahead = np.add.reduceat(tied, starts)
        ranks[block.start + rows] = 1 + ahead - right_ahead
    return ranks


def nearest(
    queries: Float[np.ndarray, "q d"], gallery: Float[np.ndarray, "g d"], k: int
) -> Neighbours:
    """The k gallery items with the highest cosine to each query; equal scores by lower index.

    Args:
      queries, gallery: embeddings, any lengths.
      k: at most g.

    Raises:
      DataError: a row is zero or not finite, widths differ, or k is not in [1, g].
    """
    check_widths(queries, gallery, "query and gallery")
    if not 1 <= k <= len(gallery):
        raise DataError(f"expected 1 <= k <= {len(gallery)} (the gallery), found k = {k}")
    queries, gallery = unit_rows(queries, "queries"), unit_rows(gallery, "gallery")
    found = [_top(queries[block] @ gallery.T, k) for block in blocks(len(queries), len(gallery))]
    return Neighbours(
        np.concatenate([indices for indices, _ in found]),
        np.concatenate([scores for _, scores in found]),
    )


def _top(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return indices, np.take_along_axis(scores, indices, axis=1)
