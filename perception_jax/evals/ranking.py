"""Ranks of relevant items in galleries that are ordered by score, and means over queries.

Shared by zero-shot classification, retrieval and conditioned evaluation. Two rules for ties:

- `positive_ranks` counts them against the model: one that gives every item the same embedding
  ranks last. For float32 cosines, computed in blocks.
- `first_ranks` and `relevant_ranks` keep equal scores in the order of the gallery, so that a
  ranking is exact and repeatable. For scores of `similarity`: the same vectors give the same score
  in every block. A query whose gallery has no relevant or no irrelevant item has no place in any
  mean: its rank is 0, its precision NaN.

All means are fractions. Letters: q queries, g gallery, d width, p right pairs, n relevant items of
all queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64, Integer, Real

from perception_jax.errors import DataError

TIE = 1e-6
"""Cosines closer than this count as equal: float32 products differ by less between two layouts of
the same vectors, and a rank must not depend on the layout."""

_BLOCK_SCORES = 1 << 22
_LAST = np.iinfo(np.int64).max


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
        scores = queries[block] @ gallery.T
        right = np.zeros(scores.shape, bool)
        right[owners[mine] - block.start, items[mine]] = True
        limit = np.max(scores, axis=1, where=right, initial=-np.inf) - TIE
        ahead = np.count_nonzero((scores >= limit[:, None]) & ~right, axis=1)
        ranks[block] = np.where(right.any(axis=1), ahead + 1, 0)
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


def similarity(
    queries: Float[np.ndarray, "q d"], gallery: Float[np.ndarray, "g d"]
) -> Float32[np.ndarray, "q g"]:
    """Dot products, the cosines of unit rows. Float64 rows spare a conversion."""
    wide = np.asarray(queries, np.float64) @ np.asarray(gallery, np.float64).T
    return wide.astype(np.float32)


def order_keys(scores: Float32[np.ndarray, "q g"]) -> Int64[np.ndarray, "q g"]:
    """Distinct numbers per row whose ascending order is the ranking; the low half is the item.

    A float's bits, read as an integer, order as the float does once negative ones are mirrored.
    """
    bits = (scores + np.float32(0)).view(np.int32)  # -0 becomes 0, which it equals
    ascending = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    return (~ascending).astype(np.int64) << 32 | np.arange(scores.shape[1], dtype=np.int64)


def first_ranks(
    scores: Float32[np.ndarray, "q g"],
    relevant: Bool[np.ndarray, "q g"],
    allowed: Bool[np.ndarray, "#q g"] | None = None,
) -> Int[np.ndarray, " q"]:
    """Rank of the best relevant item, 1 is first; 0 for a query that is skipped.

    Args:
      allowed: what takes part; everything by default. Relevant items that do not are no items.
    """
    relevant = relevant if allowed is None else relevant & allowed
    best = np.max(scores, axis=1, where=relevant, initial=-np.inf)[:, None]
    equal = scores == best
    place = np.argmax(equal & relevant, axis=1)  # of equal ones the first
    ahead = (scores > best) | equal & (np.arange(scores.shape[1]) < place[:, None])
    ahead = ahead if allowed is None else ahead & allowed
    items = scores.shape[1] if allowed is None else np.count_nonzero(allowed, axis=1)
    counts = np.count_nonzero(relevant, axis=1)
    answerable = (counts > 0) & (counts < items)
    return np.where(answerable, np.count_nonzero(ahead, axis=1) + 1, 0)


@dataclasses.dataclass(frozen=True, eq=False)
class RelevantRanks:
    """Ranks of all relevant items, query after query, ascending within each.

    Attributes:
      owner: the query of each.
      item: its place in the gallery.
      rank: 1 is first, among the items that take part.
      counts: relevant items of each query.
      gallery: items that take part, of each query.
    """

    owner: Int[np.ndarray, " n"]
    item: Int[np.ndarray, " n"]
    rank: Int[np.ndarray, " n"]
    counts: Int[np.ndarray, " q"]
    gallery: Int[np.ndarray, " q"]

    @property
    def answerable(self) -> Bool[np.ndarray, " q"]:
        """Which queries have both relevant and irrelevant items."""
        return (self.counts > 0) & (self.counts < self.gallery)

    def first(self) -> Int[np.ndarray, " q"]:
        """As `first_ranks`."""
        best = np.zeros(len(self.counts), np.int64)
        best[self.owner[::-1]] = self.rank[::-1]  # the last write wins: the smallest rank
        return np.where(self.answerable, best, 0)

    def average_precision(self) -> Float[np.ndarray, " q"]:
        """Mean over relevant items of (relevant so far / rank), not interpolated."""
        starts = np.cumsum(self.counts) - self.counts
        so_far = np.arange(len(self.rank)) - starts[self.owner] + 1
        return self._mean(so_far / self.rank)

    def r_precision(self) -> Float[np.ndarray, " q"]:
        """Share of the R relevant items that are among the first R."""
        return self._mean(self.rank <= self.counts[self.owner])

    def _mean(self, values: np.ndarray) -> np.ndarray:
        total = np.bincount(self.owner, weights=values, minlength=len(self.counts))
        return np.where(self.answerable, total / np.maximum(self.counts, 1), np.nan)


def relevant_ranks(
    scores: Float32[np.ndarray, "q g"],
    relevant: Bool[np.ndarray, "q g"],
    allowed: Bool[np.ndarray, "q g"],
) -> RelevantRanks:
    """Ranks of every relevant item among those allowed, in blocks of queries."""
    parts = [
        _relevant_ranks(scores[block], relevant[block], allowed[block])
        for block in blocks(*scores.shape)
    ]
    starts = np.cumsum([0, *(len(part.counts) for part in parts[:-1])])
    return RelevantRanks(
        owner=np.concatenate([part.owner + s for part, s in zip(parts, starts, strict=True)]),
        item=np.concatenate([part.item for part in parts]),
        rank=np.concatenate([part.rank for part in parts]),
        counts=np.concatenate([part.counts for part in parts]),
        gallery=np.concatenate([part.gallery for part in parts]),
    )


def _relevant_ranks(scores: np.ndarray, relevant: np.ndarray, allowed: np.ndarray) -> RelevantRanks:
    keys = np.where(allowed, order_keys(scores), _LAST)
    keys.sort(axis=1)
    gallery = np.count_nonzero(allowed, axis=1)
    # Keys behind the gallery hold no item: any will do, since they are not looked at.
    order = np.where(keys == _LAST, 0, keys & 0xFFFFFFFF)
    hits = np.take_along_axis(relevant & allowed, order, axis=1)
    hits &= np.arange(scores.shape[1]) < gallery[:, None]
    owner, place = np.nonzero(hits)
    return RelevantRanks(
        owner=owner,
        item=order[owner, place],
        rank=place + 1,
        counts=np.count_nonzero(hits, axis=1),
        gallery=gallery,
    )


def two_stage(
    coarse: Float32[np.ndarray, "q g"],
    fine: Float32[np.ndarray, "q g"],
    allowed: Bool[np.ndarray, "#q g"],
    top: int,
) -> Float32[np.ndarray, "q g"]:
    """Scores whose ranking has the `top` best by `coarse` ordered by `fine`, the others behind.

    Args:
      coarse, fine: of the cheap and of the expensive ranking.
      allowed: what takes part.
      top: how many the expensive ranking looks at.
    """
    allowed, found = np.broadcast_to(allowed, coarse.shape), np.empty_like(coarse)
    for block in blocks(*coarse.shape):
        places = _places(np.where(allowed[block], order_keys(coarse[block]), _LAST))
        kept = allowed[block] & (places < top)
        again = _places(np.where(kept, order_keys(fine[block]), _LAST))
        found[block] = -np.where(kept, again, places)
    return found


def _places(keys: np.ndarray) -> np.ndarray:
    """Position of each item in the ascending order of its row."""
    places = np.empty_like(keys)
    order = np.argsort(keys, axis=1)
    np.put_along_axis(places, order, np.arange(keys.shape[1])[None], axis=1)
    return places


def within(first: Int[np.ndarray, " q"], k: int) -> Float[np.ndarray, " q"]:
    """1 for a query whose first relevant item is among the first k, else 0; NaN if skipped."""
    return np.where(first > 0, (first <= k).astype(np.float64), np.nan)


def mean(values: Float[np.ndarray, " q"]) -> float | None:
    """The mean of one value per query, NaN for those that are skipped; None without a query."""
    counted = values[~np.isnan(values)]
    return float(counted.mean()) if len(counted) else None


def area_under_curve(
    present: Real[np.ndarray, " q"], absent: Real[np.ndarray, " g"]
) -> float | None:
    """Chance that a present item scores above an absent one, equal scores counting half."""
    if not len(present) or not len(absent):
        return None
    ordered = np.sort(absent)
    below, up_to = (np.searchsorted(ordered, present, side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(absent))
