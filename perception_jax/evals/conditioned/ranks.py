"""Places of relevant items in galleries ordered by score, highest first.

Equal scores stand in the order of the gallery, so a ranking is exact and repeatable. Scores are
float32 numbers rounded from float64 products: the same vectors give the same score in every block.
A query whose gallery has no relevant or no irrelevant item has no place in any mean: its rank is 0,
its precision NaN. Letters: q queries, g gallery, d width, n relevant items of all queries.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int64

from perception_jax.evals import ranking

_LAST = np.iinfo(np.int64).max


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
        for block in ranking.blocks(*scores.shape)
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
    for block in ranking.blocks(*coarse.shape):
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
