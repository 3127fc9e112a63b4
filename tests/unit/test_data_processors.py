"""Hand-computed cases of geometry and preprocessing, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from perception_jax.data.geometry import Geometry
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError, ImageError


def test_center_crop_of_a_wide_image():
    """80×40 → 20×10 → the middle 10×10: x' = x/4 - 5, y' = y/4."""
    geometry = ImageProcessor(size=10)(np.zeros((40, 80, 3), np.uint8)).geometry
    mapped = geometry.boxes(np.array([[20.0, 0.0, 60.0, 40.0], [0.0, 8.0, 24.0, 16.0]]))
    assert mapped.tolist() == [[0, 0, 10, 10], [-5, 2, 1, 4]]
    assert geometry.clip(mapped)[1].tolist() == [0, 2, 1, 4]
    shares = geometry.kept_share(np.array([[20.0, 0, 60, 40], [0, 8, 24, 16], [0, 0, 9, 9]]))
    np.testing.assert_allclose(shares, [1, 1 / 6, 0])


def test_letterbox_of_a_tall_image():
    """2×6 on a 6×6 canvas is shifted right by 2; the bars have the pad colour."""
    processor = ImageProcessor(size=6, mode="llava_pad", pad_colour=(9, 8, 7))
    processed = processor(np.full((6, 2, 3), 200, np.uint8))
    assert processed.pixels[:, :2].reshape(-1, 3).tolist() == [[9, 8, 7]] * 12
    assert (processed.pixels[:, 2:4] == 200).all()
    assert processed.geometry.boxes(np.array([[0.0, 0, 2, 6]])).tolist() == [[2, 0, 4, 6]]


def test_the_two_crops_differ_by_one_pixel_when_the_rest_is_3_modulo_4():
    image = np.repeat(np.arange(13, dtype=np.uint8)[None, :, None], 10, 0).repeat(3, 2)
    hf, tv = (ImageProcessor(size=10, mode=mode)(image).pixels for mode in ("hf_crop", "tv_crop"))
    assert (hf[0, 0, 0], tv[0, 0, 0]) == (1, 2)


def test_flipping_and_composing():
    flipped = Geometry.identity(10, 4).flipped()
    assert flipped.boxes(np.array([[1.0, 0, 3, 4]])).tolist() == [[7, 0, 9, 4]]
    assert flipped.then(flipped).boxes(np.array([[1.0, 0, 3, 4]])).tolist() == [[1, 0, 3, 4]]


def test_what_was_cut_off_does_not_reappear_in_the_bars_of_a_letterbox():
    """The right half of 8×4, padded to a square: a box over the left half is gone."""
    cut = Geometry.identity(8, 4).cropped(4, 0, 4, 4)
    padded = cut.then(Geometry.identity(4, 4).cropped(-4, -4, 12, 12))
    left, whole = np.array([[0.0, 0, 4, 4]]), np.array([[0.0, 0, 8, 4]])
    assert padded.window == (4, 4, 8, 8)
    assert padded.kept_share(left).tolist() == [0]
    assert padded.kept_share(whole).tolist() == [0.5]
    assert padded.clip(padded.boxes(whole)).tolist() == [[4, 4, 8, 8]]
    assert padded.flipped().window == (4, 4, 8, 8)


@pytest.mark.parametrize("shape", [(1, 300_000, 3), (300_000, 1, 3)])
def test_an_extreme_aspect_ratio_needs_no_extreme_memory(shape):
    """Shortest side to 224 would give 67 million × 224 pixels."""
    image = np.linspace(0, 255, 300_000).astype(np.uint8).reshape(*shape[:2], 1).repeat(3, 2)
    processed = ImageProcessor(size=224)(image)
    assert processed.pixels.shape == (224, 224, 3)
    assert np.unique(processed.pixels).tolist() in ([127], [128], [127, 128])
    with pytest.raises(ImageError, match="padded to"):
        ImageProcessor(size=224, mode="llava_pad")(image)


def test_computing_only_the_kept_part_gives_the_same_picture(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (33, 90, 3), np.uint8)
    whole = ImageProcessor(size=24, resize=30)(image)
    monkeypatch.setattr("perception_jax.data.processors._MAX_RESIZED", 1)
    part = ImageProcessor(size=24, resize=30)(image)
    assert part.geometry == whole.geometry
    assert np.abs(part.pixels.astype(int) - whole.pixels).max() <= 1


def test_legacy_config_and_padding_of_hugging_face():
    legacy = {
        "size": 32,
        "crop_size": 28,
        "do_center_crop": True,
        "resample": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }
    expected = ImageProcessor(
        size=28, resize=32, resample="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3
    )
    assert ImageProcessor.from_hf(legacy) == expected
    padded = ImageProcessor.from_hf({**legacy, "do_pad": True})
    assert (padded.mode, padded.pad_colour) == ("llava_pad", (127, 127, 127))
    assert ImageProcessor.from_hf(padded.to_hf()) == padded
    plain = ImageProcessor.from_hf({"image_processor": {**legacy, "do_normalize": False}})
    assert (plain.mean, plain.std) == ((0.0,) * 3, (1.0,) * 3)


BASE = ImageProcessor(size=28).to_hf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"resample": 0}, "bicubic"),
        ({"crop_size": {"height": 28, "width": 20}}, "square"),
        ({"size": {"shortest_edge": 20}}, "larger than"),
        ({"do_center_crop": False}, "many sizes"),
        ({"size": {"height": 40, "width": 40}}, "shortest_edge"),
        ({"size": {"longest_edge": 40}}, "square"),
    ],
)
def test_a_config_that_cannot_be_reproduced_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ImageProcessor.from_hf({**BASE, **change})


@pytest.mark.parametrize("key", ["size", "image_mean", "image_std"])
def test_a_config_that_lacks_a_key_is_refused(key):
    with pytest.raises(ConfigError, match=f"expected the key '{key}'"):
        ImageProcessor.from_hf({name: value for name, value in BASE.items() if name != key})


def test_tv_crop_survives_a_hugging_face_file():
    processor = ImageProcessor(size=28, mode="tv_crop")
    assert ImageProcessor.from_hf(processor.to_hf()) == processor
    with pytest.raises(ConfigError, match="perception_jax_mode"):
        ImageProcessor.from_hf(processor.to_hf() | {"perception_jax_mode": "middle"})


def test_what_cannot_be_exported_is_refused():
    with pytest.raises(ConfigError, match="mean colour"):
        ImageProcessor(size=28, mode="llava_pad", pad_colour=(0, 0, 0)).to_hf()
    with pytest.raises(ConfigError, match=r"size: expected an integer of 1 to"):
        ImageProcessor(size=0)
    with pytest.raises(ConfigError, match="no crop"):
        ImageProcessor(size=8, mode="squash", resize=9)


def test_equal_size_is_not_resampled():
    image = np.random.default_rng(1).integers(0, 256, (28, 28, 3), np.uint8)
    for mode in ("hf_crop", "tv_crop", "squash", "llava_pad"):
        assert np.array_equal(ImageProcessor(size=28, mode=mode)(image).pixels, image)
