"""What a score must beat: chance, and the nearest training image by pixels.

Letters: n training images, m test images, H W pixels, q queries.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8
from PIL import Image

from perception_jax.errors import DataError
from perception_jax.evals import ranking


def chance_top_k(classes: int, k: int) -> float:
    """Expected top-k rate of guessing among equally likely classes."""
    return min(k, classes) / classes


def chance_recall(rights: Integer[np.ndarray, " q"], gallery: int, k: int) -> float:
    """Expected recall@k of a random order, over queries with `rights` right items each."""
    if k > gallery:
        return 1.0
    counts, queries = np.unique(rights, return_counts=True)
    # A random order misses when all of the first k are among the wrong items.
    misses = [math.comb(gallery - c, k) / math.comb(gallery, k) for c in counts.tolist()]
    return float(1.0 - np.dot(misses, queries) / len(rights))


def pixel_features(
    images: UInt8[np.ndarray, "n H W 3"], *, size: int = 16
) -> Float[np.ndarray, "n f"]:
    """Images shrunk to size x size by area, as unit vectors of zero mean: f = 3 * size**2.

    Brightness and contrast of the whole image drop out; colour differences stay. The dot product of
    two rows is the correlation of their pixels. A flat image has no contrast and becomes zeros.
    """
    rows = [
        np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX)).ravel()
        for image in images
    ]
    features = np.stack(rows).astype(np.float64)
    features -= features.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    return (features / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)


def nearest_pixel_top(
    train_images: UInt8[np.ndarray, "n H W 3"],
    train_labels: Integer[np.ndarray, " n"],
    test_images: UInt8[np.ndarray, "m H2 W2 3"],
    *,
    k: int,
    size: int = 16,
) -> Int[np.ndarray, "m k"]:
    """The k labels whose nearest training image is closest by `pixel_features`, best first.

    Equally close labels come in increasing order.

    Raises:
      DataError: labels and images differ in number, or there are fewer than k distinct labels.
    """
    features = (pixel_features(images, size=size) for images in (train_images, test_images))
    train, test = features
    return nearest_labels(train, train_labels, test, k=k)


def nearest_labels(
    train: Float[np.ndarray, "n d"],
    train_labels: Integer[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    *,
    k: int,
) -> Int[np.ndarray, "m k"]:
    """The k labels that have the training row with the largest dot product, best first.

    Equally close labels come in increasing order.

    Raises:
      DataError: labels and rows differ in number, or there are fewer than k distinct labels.
    """
    check_training(train, train_labels, k)
    order = np.argsort(train_labels, kind="stable")
    labels, starts = np.unique(train_labels[order], return_index=True)
    train = train[order]
    best = []
    for block in ranking.blocks(len(test), len(train)):
        closeness = np.maximum.reduceat(test[block] @ train.T, starts, axis=1)
        best.append(np.argsort(-closeness, axis=1, kind="stable")[:, :k])
    return labels[np.concatenate(best)].astype(np.int64)


def check_training(images: np.ndarray, labels: np.ndarray, k: int) -> None:
    """Raises `DataError` unless there is a label per image and at least k distinct labels."""
    distinct = len(np.unique(labels))
    if labels.shape != (len(images),) or distinct < k:
        raise DataError(
            f"expected one label per training image and at least {k} distinct labels, found "
            f"{len(images)} images, labels of shape {labels.shape} and {distinct} distinct labels"
        )
