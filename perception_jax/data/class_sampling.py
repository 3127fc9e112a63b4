"""Random classes and images of an `ObjectIndex`, for samplers of batches.

Letters: M rows, Q images, K candidates.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, Int32

from perception_jax.data.object_index import ObjectIndex

CANDIDATES = 16
"""Number of random absent classes of which the hard one is chosen."""


def draw_absent(
    index: ObjectIndex, image: Int[np.ndarray, " M"], rng: np.random.Generator, *, hard: float
) -> Int32[np.ndarray, " M"]:
    """Draws a class that each row's image lacks, with probability `hard` a hard one.

    Classes are drawn uniformly from the verified absent ones if the image has any, else from those
    that are not annotated. The hard one of `CANDIDATES` draws is the class that most often occurs
    together with the image's classes.
    """
    candidates = _absent_candidates(index, image, rng)
    present, valid = index.present.padded(image)
    together = index.together[present[:, :, None], candidates[:, None, :]]
    score = np.where(valid[:, :, None], together, 0).sum(axis=1)
    chosen = np.where(rng.random(len(image)) < hard, score.argmax(axis=1), 0)
    return candidates[np.arange(len(image)), chosen]


def draw_other_class(
    index: ObjectIndex, pair: Int[np.ndarray, "*N"], rng: np.random.Generator
) -> Int[np.ndarray, "*N"]:
    """Draws a pair of another class of the same image, uniformly; -1 where there is none."""
    image = index.pair_images[pair]
    start, count = index.pairs.starts[image], index.pairs.counts(image)
    other = start + rng.integers(np.maximum(count - 1, 1))
    other += other >= pair
    return np.where(count > 1, other, -1)


def draw_distinct(
    pairs: Int[np.ndarray, "_"], count: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " Q"], Int[np.ndarray, "_"]]:
    """Draws `count` pairs of a class, distinct as far as possible, and up to as many others."""
    order = rng.choice(len(pairs), min(len(pairs), 2 * count), replace=False)
    if len(order) < count:
        more = rng.integers(len(pairs), size=count - len(order))
        order = np.concatenate([order, more])
    return pairs[order[:count]], pairs[order[count:]]


def draw_others(
    own: Int[np.ndarray, "_"],
    spare: Int[np.ndarray, "_"],
    pool: Int[np.ndarray, "_"],
    rng: np.random.Generator,
) -> Int[np.ndarray, "_"]:
    """Draws another pair of the same class for each pair, if the class has more than one.

    Args:
      own: the pairs.
      spare: unused pairs of the class, which are taken first.
      pool: all pairs of the class, ascending.
    """
    given = spare[: len(own)]
    rest = own[len(given) :]
    if len(pool) == 1:
        return np.concatenate([given, rest])
    other = rng.integers(np.full(len(rest), len(pool) - 1))
    other += other >= np.searchsorted(pool, rest)
    return np.concatenate([given, pool[other]])


def _absent_candidates(
    index: ObjectIndex, image: Int[np.ndarray, " M"], rng: np.random.Generator
) -> Int32[np.ndarray, "M K"]:
    """Draws absent classes of each row's image, with replacement."""
    draws = rng.random((len(image), CANDIDATES))
    negative, _ = index.negative.padded(image)
    verified = index.negative.counts(image)
    listed = np.take_along_axis(negative, _scaled(draws, np.maximum(verified, 1)), axis=1)
    # The n-th class that is not excluded: n, moved up past the excluded ones before it.
    excluded, valid = index.excluded.padded(image)
    valid = valid & (excluded < index.annotated)
    before = np.where(valid, excluded - np.arange(excluded.shape[1]), index.annotated)
    free = np.maximum(index.annotated - valid.sum(axis=1), 1)
    number = _scaled(draws, free)
    moved = number + (before[:, None, :] <= number[:, :, None]).sum(axis=-1)
    return np.where(verified[:, None] > 0, listed, moved).astype(np.int32)


def _scaled(
    draws: Float[np.ndarray, "M K"], counts: Int[np.ndarray, " M"]
) -> Int[np.ndarray, "M K"]:
    """Scales draws in [0, 1) to integers below each row's count."""
    return np.minimum((draws * counts[:, None]).astype(np.int64), counts[:, None] - 1)
