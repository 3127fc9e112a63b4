"""Zero-shot and retrieval scores by hand, against brute force, and under ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.errors import ConfigError, DataError
from perception_jax.evals import ranking, zero_shot
from perception_jax.evals.intervals import wilson_interval


def embeddings(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def test_zero_shot_by_hand():
    # Cosines by angle: classes at 0, 90 and 180 degrees.
    classes = np.array([[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]])
    angles = np.deg2rad([10, 80, 100, 170])
    images = 5 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    scores = zero_shot.zero_shot(images, classes, np.array([0, 0, 1, 0]))
    assert scores.predictions.tolist() == [0, 1, 1, 2]
    assert scores.ranks.tolist() == [1, 2, 1, 3]
    assert scores.correct.tolist() == [True, False, True, False]
    assert (scores.recall, scores.queries) == ({1: 0.5, 5: 1.0}, 4)
    assert scores.chance_recall == {1: 1 / 3, 5: 1.0}
    assert scores.class_counts.tolist() == [3, 1, 0]
    np.testing.assert_allclose(scores.per_class, [1 / 3, 1.0, np.nan])
    assert scores.recall_interval[1] == wilson_interval(2, 4)


def test_a_collapsed_model_scores_nothing():
    same = np.ones((12, 4), np.float32)
    scores = zero_shot.zero_shot(same, same, np.arange(12))
    assert scores.recall == {1: 0.0, 5: 0.0}
    pairs = np.stack([np.arange(12)] * 2, axis=1)
    found = zero_shot.retrieval(same, same, pairs)
    assert found.image_to_text.recall == {1: 0.0, 5: 0.0, 10: 0.0}
    assert found.text_to_image.median_rank == 12.0


def test_retrieval_by_hand():
    # Three images and four texts on the unit circle; text 3 belongs to two images, image 2 to none.
    def circle(*degrees: float) -> np.ndarray:
        angles = np.deg2rad(degrees)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)

    images, texts = circle(0, 40, 90), circle(5, 30, 50, 95)
    pairs = np.array([[0, 1], [0, 3], [1, 2], [1, 3]])
    scores = zero_shot.retrieval(images, texts, pairs, ks=(1, 2))
    # Image 0: text 0 (wrong) is nearer than text 1. Image 1: text 1 (30) and text 2 (50) tie at 10
    # degrees, and ties go against the model.
    assert scores.image_to_text.ranks.tolist() == [2, 2, 0]
    assert scores.image_to_text.queries == 2
    assert scores.image_to_text.recall == {1: 0.0, 2: 1.0}
    assert scores.image_to_text.median_rank == 2.0
    # Of four texts, two are right: a random first is right in 1/2, none of two in 1/6.
    assert scores.image_to_text.chance_recall[1] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert scores.image_to_text.chance_recall[2] == pytest.approx(1 - 1 / 6)
    # Text 0 has no pair. Text 1 (30): image 1 is nearer than 0. Text 2 (50): image 1 first.
    # Text 3 (95): image 2 is nearest, then image 1.
    assert scores.text_to_image.ranks.tolist() == [0, 2, 1, 2]
    assert scores.text_to_image.recall == {1: 1 / 3, 2: 1.0}
    assert scores.text_to_image.recall_interval[1] == wilson_interval(1, 3)


def test_right_items_never_count_against_each_other():
    images, texts = np.eye(2, 3), np.array([[1.0, 0, 0], [2.0, 0, 0], [3.0, 0, 0], [0, 1.0, 1.0]])
    pairs = np.array([[0, 0], [0, 1], [0, 2], [1, 3], [0, 1]])
    scores = zero_shot.retrieval(images, texts, pairs)
    assert scores.image_to_text.ranks.tolist() == [1, 1]
    # One of the three equal texts is now wrong, and ties with the right ones.
    scores = zero_shot.retrieval(images, texts, pairs[1:])
    assert scores.image_to_text.ranks.tolist() == [2, 1]


def brute_rank(queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray) -> list[int]:
    ranks = []
    for q, query in enumerate(queries):
        right = {int(g) for p, g in pairs if p == q}
        cosines = [
            float(query @ item / np.linalg.norm(query) / np.linalg.norm(item)) for item in gallery
        ]
        best = max((cosines[g] for g in right), default=None)
        ranks.append(
            0
            if best is None
            else 1 + sum(c >= best for g, c in enumerate(cosines) if g not in right)
        )
    return ranks


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), block=st.integers(1, 60))
def test_retrieval_equals_brute_force_in_any_blocks_and_gallery_order(seed, block):
    rng = np.random.default_rng(seed)
    images, texts = embeddings(rng, 7, 5), embeddings(rng, 9, 5)
    texts[4] = 2 * texts[1]  # an exact tie
    pairs = np.stack([rng.integers(0, 7, 12), rng.integers(0, 9, 12)], axis=1)
    whole = zero_shot.retrieval(images, texts, pairs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_BLOCK_SCORES", block)
        blocked = zero_shot.retrieval(images, texts, pairs)
    order = rng.permutation(9)
    shuffled = pairs.copy()
    shuffled[:, 1] = np.argsort(order)[pairs[:, 1]]
    moved = zero_shot.retrieval(images, texts[order], shuffled)
    wide = images.astype(np.float64), texts.astype(np.float64)
    expected = brute_rank(*wide, pairs)
    for scores in (whole, blocked, moved):
        assert scores.image_to_text.ranks.tolist() == expected
    back = brute_rank(wide[1], wide[0], pairs[:, ::-1])
    assert whole.text_to_image.ranks.tolist() == back
    assert moved.text_to_image.ranks.tolist() == [back[k] for k in order]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_zero_shot_does_not_depend_on_class_order_or_blocks(seed):
    rng = np.random.default_rng(seed)
    images, classes = embeddings(rng, 30, 6), embeddings(rng, 11, 6)
    labels = rng.integers(0, 11, 30)
    first = zero_shot.zero_shot(images, classes, labels)
    order = rng.permutation(11)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_BLOCK_SCORES", 40)
        second = zero_shot.zero_shot(images, classes[order], np.argsort(order)[labels])
    assert first.ranks.tolist() == second.ranks.tolist()
    assert first.predictions.tolist() == order[second.predictions].tolist()
    np.testing.assert_array_equal(first.per_class[order], second.per_class)
    assert first.recall[1] == np.mean(first.predictions == labels)
    order = np.argsort(-zero_shot_cosines(images, classes), axis=1)[:, :5]
    assert first.recall[5] == np.mean((order == labels[:, None]).any(axis=1))


def zero_shot_cosines(images: np.ndarray, classes: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(images, axis=1)[:, None] * np.linalg.norm(classes, axis=1)
    return images @ classes.T / lengths


def test_class_embeddings_are_renormalised_means_over_templates():
    table = {"a cat": [3.0, 0.0], "cat!": [0.0, 0.1], "a dog": [0.0, -1.0], "dog!": [0.0, -9.0]}
    asked = []

    def encode(texts: list[str]) -> np.ndarray:
        asked.append(len(texts))
        return np.array([table[text] for text in texts])

    found = zero_shot.class_embeddings(encode, ["cat", "dog"], ["a {}", "{}!"])
    half = math.sqrt(0.5)
    np.testing.assert_allclose(found, [[half, half], [0.0, -1.0]], atol=1e-6)
    assert asked == [4]


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        (["cat", "cat"], ["{}"], r"distinct class names, found \['cat'\] more than once"),
        ([], ["{}"], "distinct class names, found none"),
        (["cat"], ["a photo"], r"one '\{\}' for the class name, found \['a photo'\]"),
        (["cat"], [], "templates with one"),
    ],
)
def test_class_embeddings_refuse(names, templates, message):
    with pytest.raises(DataError, match=message):
        zero_shot.class_embeddings(lambda texts: np.ones((len(texts), 2)), names, templates)


def test_one_class_name_is_no_list_of_letters(unchecked):
    asked = []
    zero_shot.class_embeddings(lambda texts: asked.append(texts) or np.ones((1, 2)), "cat", "a {}")
    assert asked == [["a cat"]]
    with pytest.raises(ConfigError, match=r"names\[0\]: expected a string, found a int"):
        zero_shot.class_embeddings(lambda texts: np.ones((1, 2)), [7])


def test_class_embeddings_refuse_a_wrong_number_of_rows():
    with pytest.raises(DataError, match=r"one row for each of 2 texts, found shape \(1, 2\)"):
        zero_shot.class_embeddings(lambda texts: np.ones((1, 2)), ["cat", "dog"])


def test_bad_embeddings_are_named():
    good, bad = np.ones((3, 2)), np.ones((3, 2))
    bad[1] = 0
    with pytest.raises(DataError, match=r"length 0\.0 in row 1 of image embeddings"):
        zero_shot.zero_shot(bad, good, np.arange(3))
    bad[1] = np.nan
    with pytest.raises(DataError, match="row 1 of text embeddings"):
        zero_shot.retrieval(good, bad, np.array([[0, 0]]))
    with pytest.raises(DataError, match="non-empty matrix"):
        ranking.unit_rows(np.ones((0, 4)), "images")
    with pytest.raises(DataError, match="of one width, found 2 and 4"):
        ranking.check_widths(good, np.ones((3, 4)), "image and text")


def test_bad_labels_and_pairs_are_named():
    with pytest.raises(DataError, match=r"labels in \[0, 3\), found 3 at image 1"):
        zero_shot.check_labels(np.array([0, 3]), 2, 3)
    with pytest.raises(DataError, match="one label for each of 3 images"):
        zero_shot.check_labels(np.array([0, 1]), 3, 3)
    with pytest.raises(DataError, match=r"found \(2, 1\) in row 1"):
        zero_shot.check_pairs(np.array([[0, 0], [2, 1]]), 2, 2)
    for kind in (float, bool, str):
        with pytest.raises(DataError, match="labels as integers"):
            zero_shot.check_labels(np.array([0, 1]).astype(kind), 2, 3)
        with pytest.raises(DataError, match="pairs of integers"):
            zero_shot.check_pairs(np.array([[0, 1]]).astype(kind), 2, 2)
    with pytest.raises(DataError, match=r"cut-offs of 1 or more, found ks = \(1, 0\)"):
        zero_shot.retrieval(np.eye(2), np.eye(2), np.array([[0, 0]]), ks=(1, 0))
    with pytest.raises(DataError, match="at least one"):
        zero_shot.check_pairs(np.zeros((0, 2), int), 2, 2)


def test_nearest_neighbours():
    gallery = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [3.0, 3.0]])
    found = ranking.nearest(np.array([[5.0, 0.1], [-1.0, 0.5]]), gallery, 2)
    assert found.indices.tolist() == [[0, 3], [2, 1]]
    assert found.scores[0, 0] == pytest.approx(5 / math.hypot(5, 0.1), abs=1e-6)
    with pytest.raises(DataError, match="found k = 5"):
        ranking.nearest(gallery, gallery, 5)


def test_wilson_interval():
    # Worked example: 8 of 10 at 95 % gives 0.4901 to 0.9433.
    assert wilson_interval(8, 10) == pytest.approx((0.4901, 0.9433), abs=2e-4)
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0
    with pytest.raises(DataError, match="found 0 of 0"):
        wilson_interval(0, 0)
