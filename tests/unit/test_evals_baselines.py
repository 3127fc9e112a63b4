"""Baselines by hand: chance, nearest pixel."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from perception_jax.errors import DataError
from perception_jax.evals import baselines


def half(side: str, dark: int = 0, light: int = 255, size: int = 32) -> np.ndarray:
    """A picture whose one half is light."""
    image = np.full((size, size, 3), dark, np.uint8)
    middle = size // 2
    window = {
        "left": np.s_[:, :middle],
        "right": np.s_[:, middle:],
        "top": np.s_[:middle],
        "bottom": np.s_[middle:],
    }[side]
    image[window] = light
    return image


def test_nearest_pixel_ignores_brightness_contrast_and_size():
    train = np.stack([half("left"), half("right"), half("top"), half("left")])
    labels = np.array([7, 3, 5, 7])
    test = np.stack([half("right", 90, 110, 48), half("top", 0, 40, 48), half("left", 5, 9, 48)])
    assert baselines.nearest_pixel_top(train, labels, test, k=1).tolist() == [[3], [5], [7]]


def test_nearest_pixel_top_lists_distinct_labels_by_their_best_image():
    train = np.stack([half("left"), half("top"), half("left"), half("right"), half("bottom")])
    labels = np.array([1, 2, 1, 3, 2])
    # "left" again: label 1 fits exactly; 2 is uncorrelated; 3 is the negative.
    found = baselines.nearest_pixel_top(train, labels, half("left")[None], k=3)
    assert found.tolist() == [[1, 2, 3]]


def test_pixel_features_are_unit_and_a_flat_image_is_zero():
    flat = np.full((1, 8, 8, 3), 9, np.uint8)
    features = baselines.pixel_features(np.concatenate([flat, half("left", size=8)[None]]), size=4)
    assert features.shape == (2, 48)
    assert np.linalg.norm(features, axis=1) == pytest.approx([0.0, 1.0], abs=1e-6)
    assert features.sum(axis=1) == pytest.approx([0.0, 0.0], abs=1e-5)


def test_bad_training_sets_are_refused():
    images = np.stack([half("left"), half("right")])
    with pytest.raises(DataError, match="at least 2 distinct labels, found 2 images"):
        baselines.nearest_pixel_top(images, np.array([1, 1]), images, k=2)
    with pytest.raises(DataError, match="one label per training image"):
        baselines.check_training(images, np.array([1]), 1)


def test_chance_levels():
    assert baselines.chance_top_k(300, 5) == pytest.approx(1 / 60)
    assert baselines.chance_top_k(3, 5) == 1.0


def test_chance_recall_counts_orders():
    # Every order of five items, of which the first two (or one) are right: recall@2 by counting.
    orders = list(itertools.permutations(range(5)))
    share = {rights: np.mean([min(order[:2]) < rights for order in orders]) for rights in (1, 2)}
    found = baselines.chance_recall(np.array([1, 2, 2]), 5, 2)
    assert found == pytest.approx((share[1] + 2 * share[2]) / 3)
    assert baselines.chance_recall(np.array([1]), 5, 10) == 1.0
