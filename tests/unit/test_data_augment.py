"""Image augmentations: identity, what each setting changes, what is refused; altered captions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from perception_jax.data import altered as alterations
from perception_jax.data.augment import ImageAugment
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.data.transforms import ImageTextTransform
from perception_jax.errors import ConfigError

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
RAMP = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None] * 4, (40, 60, 3)).copy()
SETTINGS = {
    "min_area": 0.3,
    "warp": 0.1,
    "brightness": 0.5,
    "contrast": 0.5,
    "blur": 0.05,
    "sharpen": 2.0,
    "bits": 2,
    "saturation": 0.5,
    "hue": 0.2,
    "grey": 1.0,
    "invert": 1.0,
}
COLOUR = {"saturation", "hue", "grey", "invert"}


def changed(augment: ImageAugment, image: np.ndarray, seed: int = 0) -> np.ndarray:
    found = augment(image, np.random.default_rng(seed))
    assert found.shape == image.shape
    assert found.dtype == np.uint8
    return found


def test_without_settings_nothing_changes():
    assert set(SETTINGS) | {"colour"} == {field.name for field in dataclasses.fields(ImageAugment)}
    np.testing.assert_array_equal(changed(ImageAugment(), IMAGE), IMAGE)
    off = ImageAugment(colour=False, **{name: SETTINGS[name] for name in COLOUR})
    np.testing.assert_array_equal(changed(off, IMAGE), IMAGE)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_changes_images_and_repeats_with_its_generator(name):
    augment = ImageAugment(colour=name in COLOUR, **{name: SETTINGS[name]})
    seeds = range(8)
    found = [changed(augment, IMAGE, seed) for seed in seeds]
    assert any((image != IMAGE).any() for image in found)
    for seed, image in zip(seeds, found, strict=True):
        np.testing.assert_array_equal(changed(augment, IMAGE, seed), image)


def test_light_does_not_change_hues_and_grey_removes_colour():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 180
    for seed in range(8):
        lit = changed(ImageAugment(brightness=0.5), red, seed)
        assert not lit[..., 1:].any()
        assert 85 <= lit[0, 0, 0] <= 255
    grey = changed(ImageAugment(colour=True, grey=1.0), IMAGE)
    assert (grey == grey[..., :1]).all()
    np.testing.assert_array_equal(
        changed(ImageAugment(colour=True, invert=1.0), IMAGE), 255 - IMAGE
    )
    turned = changed(ImageAugment(colour=True, hue=0.5), red)
    assert turned.max() == pytest.approx(180, abs=2)  # another hue of the same value


def test_the_window_is_what_a_crop_shows():
    for seed in range(20):
        image, (left, top, wide, tall) = ImageAugment(min_area=0.3).view(
            RAMP, np.random.default_rng(seed)
        )
        assert 0 <= left <= 60 - wide
        assert 0 <= top <= 40 - tall
        assert wide * tall >= 0.27 * 60 * 40
        middle = image[:, 30].mean() / 4
        assert middle == pytest.approx(left + wide / 2, abs=1.0)


def test_a_warp_keeps_left_and_right_and_stays_inside():
    for seed in range(20):
        image = changed(ImageAugment(warp=0.1), RAMP + 10, seed)
        assert image.min() >= 9  # no black border
        assert np.corrcoef(image[20, :, 0], np.arange(60))[0, 1] > 0.95


@pytest.mark.parametrize(
    ("name", "value"),
    [("min_area", 0.0), ("warp", 0.3), ("bits", 0), ("hue", 0.6), ("grey", -0.1)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"ImageAugment\.{name}: expected"):
        ImageAugment(**{name: value})


@pytest.mark.parametrize(
    ("caption", "possible"),
    [
        ("a cat facing left", {"a cat facing right"}),
        ("a dog the right way up", {"a dog upside down"}),
        ("a leftover cat", {""}),
        (
            "four cats one above another",
            {
                *("four cats side by side", "four cats in a circle"),
                *(f"{n} cats one above another" for n in ("two", "three", "five", "six")),
            },
        ),
    ],
)
def test_altered_captions_are_false_by_one_claim(caption, possible):
    found = {alterations.altered(caption, np.random.default_rng(k)) for k in range(60)}
    assert found == possible


def test_the_transform_gives_altered_captions_and_changed_images():
    parts = {"processor": ImageProcessor(size=16), "tokenizer": ClipTokenizer.shipped(1024, 16)}
    record = Record(id="r", images=(IMAGE,), captions=("a red cat",))
    plain = ImageTextTransform(**parts)(record, np.random.default_rng(1))
    transform = ImageTextTransform(
        **parts, image_augment=ImageAugment(brightness=0.5), altered=True
    )
    found = transform(record, np.random.default_rng(1))
    assert found.keys() == {*plain, "altered_ids", "altered"}
    assert found["altered"]
    text = transform.tokenizer.decode(found["altered_ids"])
    assert text != "a red cat"
    assert text.startswith("a ")
    assert text.endswith(" cat")
    assert (found["image"] != plain["image"]).any()
    unalterable = dataclasses.replace(record, captions=("a cat",))
    assert not transform(unalterable, np.random.default_rng(1))["altered"]
