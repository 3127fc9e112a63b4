"""What the shared transforms give, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.data.transforms import Augment, ImageTextTransform
from perception_jax.errors import ConfigError, DataError

IMAGE = np.random.default_rng(0).integers(0, 256, (21, 34, 3), np.uint8)
RECORD = Record(id="r", images=(IMAGE,), captions=("one", "two", "three"))
PARTS = {"processor": ImageProcessor(size=16), "tokenizer": ClipTokenizer.shipped(600, 8)}


def drawn(transform: ImageTextTransform, seed: int) -> tuple[str, np.ndarray]:
    example = transform(RECORD, np.random.default_rng(seed))
    assert {name: (value.shape, value.dtype.name) for name, value in example.items()} == {
        "image": ((16, 16, 3), "uint8"),
        "ids": ((8,), "int32"),
        "id_mask": ((8,), "bool"),
    }
    return transform.tokenizer.decode(example["ids"]), example["image"]


def test_captions_and_augmentation_come_from_the_generator():
    transform = ImageTextTransform(**PARTS, augment=Augment(min_area=0.3, flip=0.5))
    runs = [drawn(transform, seed) for seed in range(30)]
    assert {text for text, _ in runs} == {"one", "two", "three"}
    assert len({pixels.tobytes() for _, pixels in runs}) > 20
    again = drawn(transform, 7)
    assert again[0] == runs[7][0]
    assert np.array_equal(again[1], runs[7][1])


def test_evaluation_takes_the_first_caption_and_the_plain_image():
    transform = ImageTextTransform(**PARTS, caption="first")
    for seed in range(5):
        text, pixels = drawn(transform, seed)
        assert text == "one"
        assert np.array_equal(pixels, PARTS["processor"](IMAGE).pixels)


def test_no_augmentation_is_the_plain_image_and_flipping_mirrors_it():
    plain = PARTS["processor"](IMAGE)
    none = Augment()(IMAGE, PARTS["processor"], np.random.default_rng(0))
    assert np.array_equal(none.pixels, plain.pixels)
    assert none.geometry == plain.geometry
    mirrored = Augment(flip=1.0)(IMAGE, PARTS["processor"], np.random.default_rng(0))
    assert np.array_equal(mirrored.pixels, plain.pixels[:, ::-1])
    assert mirrored.geometry == plain.geometry.flipped()


def test_crops_keep_at_least_the_smallest_area():
    for seed in range(50):
        augment = Augment(min_area=0.25)
        geometry = augment(
            IMAGE, ImageProcessor(size=9, mode="squash"), np.random.default_rng(seed)
        )
        whole = np.array([[0.0, 0, 9, 9]])
        x1, y1, x2, y2 = geometry.geometry.inverse_boxes(whole)[0]
        assert 0 <= x1 < x2 <= 34 + 1e-9
        assert 0 <= y1 < y2 <= 21 + 1e-9
        assert (x2 - x1) * (y2 - y1) / (21 * 34) > 0.2  # 0.25, but for whole pixels


def test_what_is_refused():
    transform = ImageTextTransform(**PARTS)
    with pytest.raises(DataError, match="at least one caption"):
        transform(Record(id="r", images=(IMAGE,)), np.random.default_rng(0))
    for settings in ({"min_area": 0.0}, {"min_area": 1.5}, {"flip": -0.1}):
        with pytest.raises(ConfigError, match="min_area"):
            Augment(**settings)
