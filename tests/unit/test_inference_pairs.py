"""Pairs of an image and a text in calls of one shape: each image once, the same for any batch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.errors import ConfigError, DataError
from perception_jax.inference import BatchedPairs, ImageTextPairs, PixelsInMemory
from perception_jax.shard.mesh import make_mesh

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 2, 2, 3), np.uint8)
EXTRA = np.full((2, 2, 3), 7, np.uint8)
TEXTS = np.array([3, 5, 7], np.float32)
PAIRS = ImageTextPairs(np.array([0, 0, 0, 2, 2, 3, 5]), np.array([0, 1, 2, 1, 0, 2, 1]))
EXPECTED = [
    scale * np.concatenate([PIXELS, EXTRA[None]])[image].sum() * TEXTS[text]
    for scale, image, text in zip([2.0] * 7, PAIRS.image, PAIRS.text, strict=True)
]


def times(model, pixels, image, texts, text):
    sums = pixels[image].astype(jnp.float32).sum((1, 2, 3))
    return {"product": model * sums * texts[text]}


class Counting(PixelsInMemory):
    """Pixels that note each reading."""

    def __init__(self):
        super().__init__(PIXELS)
        self.read = []

    def stream(self, indices):
        for index in indices:
            self.read.append(int(index))
            yield PIXELS[index]


@pytest.mark.parametrize(("batch", "devices"), [(1, 1), (3, 1), (64, 1), (3, 8)])
def test_results_are_those_of_the_pairs_and_each_image_is_read_once(batch, devices):
    traces = []

    def counted(*arguments):
        traces.append(None)
        return times(*arguments)

    run, images = BatchedPairs(counted, batch_size=batch), Counting()
    mesh = make_mesh(2, 2, 2) if devices == 8 else None
    out = run(2.0, images, TEXTS, PAIRS, images_per_call=4, extra=EXTRA, mesh=mesh)
    np.testing.assert_array_equal(out["product"], EXPECTED)
    assert images.read == [0, 2, 3]
    assert len(traces) == 1
    size = 4 if devices == 8 else batch  # four batch shards
    assert run.timed == max(0, 7 - size)


def test_images_of_a_call_are_counted():
    assert [PAIRS.images_per_call(batch) for batch in (1, 3, 4, 7)] == [1, 2, 3, 4]
    assert PAIRS.images().tolist() == [0, 2, 3, 5]


def test_nothing_to_run_on_is_one_clear_error():
    none = ImageTextPairs(np.zeros(0, int), np.zeros(0, int))
    with pytest.raises(DataError, match="at least one row"):
        BatchedPairs(times, batch_size=2)(2.0, Counting(), TEXTS, none, images_per_call=1)
    with pytest.raises(ConfigError, match="batch_size: expected at least 1, found 0"):
        BatchedPairs(times, batch_size=0)
