"""What the public functions take: one or several images and texts in any usual form, names of
dtypes; and what they say to anything else."""

from __future__ import annotations

import io
import os
import pathlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import PIL.Image
import pytest

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError, ImageError
from perception_jax.interop.dtypes import floating_dtype


@pytest.fixture(scope="module")
def clip() -> Loaded:
    return perception_jax.load("scenes-clip")


@pytest.fixture
def photo(tmp_path) -> pathlib.Path:
    """Two halves, red and blue, stored lying on their side."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:, :30, 0] = pixels[:, 30:, 2] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


def test_one_image_in_every_form_gives_the_same_pixels(photo):
    processor = Processor(image=ImageProcessor(size=16), tokenizer=None)
    expected = processor.images([photo])
    assert expected.shape == (1, 16, 16, 3)
    raw = photo.read_bytes()
    upright = np.asarray(PIL.Image.open(photo).transpose(PIL.Image.Transpose.ROTATE_270))
    loaded = PIL.Image.open(photo)
    loaded.load()
    before = len(os.listdir("/proc/self/fd"))
    forms = {
        "path": photo,
        "text": str(photo),
        "bytes": raw,
        "bytearray": bytearray(raw),
        "memoryview": memoryview(raw),
        "lazy PIL image": PIL.Image.open(io.BytesIO(raw)),
        "loaded PIL image": loaded,
        "array": upright,
        "JAX array": jnp.asarray(upright),
    }
    for name, image in forms.items():
        np.testing.assert_array_equal(processor.images(image), expected, err_msg=name)
        np.testing.assert_array_equal(processor.images([image]), expected, err_msg=name)
    both = processor.images(np.stack([upright, upright]))
    np.testing.assert_array_equal(both, np.concatenate([expected, expected]))
    assert processor.images(iter([photo, upright])).shape == (2, 16, 16, 3)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (3, r"images: expected an image or a list .*found a int \(3\)"),
        (None, "images: expected an image or a list"),
        ([], "at least one image, found none"),
        ([[1, 2]], r"images\[0\]: expected a path, the bytes of a file"),
        ({"a": b""}, "found a dict"),
        ([b"x", 7], r"images\[1\]: .*found a int"),
        (np.zeros((4, 4), np.uint8), r"images\[0\]: .*found an array uint8\[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), r"found an array float32\[4, 4, 3\]\. Colours are 0 to"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"images\[0\]: .*uint8\[3, 4, 4\].*channels last"),
    ],
)
def test_images_of_no_kind_are_named(images, message):
    with pytest.raises(ConfigError, match=message):
        Processor(image=ImageProcessor(size=16), tokenizer=None).images(images)


def test_a_damaged_pil_image_is_an_image_error():
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    PIL.Image.fromarray(noise).save(content, "JPEG")
    cut = PIL.Image.open(io.BytesIO(content.getvalue()[:-300]))
    with pytest.raises(ImageError, match="PIL image RGB 60×60: cannot be decoded"):
        Processor(image=ImageProcessor(size=16), tokenizer=None).images(cut)


def test_one_text_or_several(clip):
    one = clip.processor.texts("a dog")
    assert one.shape == (1, clip.config.text.context)
    np.testing.assert_array_equal(one, clip.processor.texts(("a dog", "a bus"))[:1])
    np.testing.assert_array_equal(one, clip.processor.texts(np.array(["a dog"])))
    for texts, message in (
        (["a dog", 3], r"texts\[1\]: expected a string, found a int \(3\)"),
        ([["a dog"]], r"texts\[0\]: expected a string, found a list"),
        (b"a dog", "texts: expected a string or a list of strings, found a bytes"),
        (None, "texts: expected a string or a list"),
        ({"a dog"}, "found a set"),
        (["", "a \ud83d dog"], r"texts\[1\]: expected Unicode text, found half a surrogate pair"),
    ):
        with pytest.raises(ConfigError, match=message):
            clip.processor.texts(texts)


def test_texts_that_are_cut_are_said(clip, caplog):
    """Those that differ behind the cut alone get one embedding."""
    room = clip.config.text.context - 2
    fits, long = "dog " * room, "dog " * room + "cat"
    assert (clip.processor.texts(fits) == clip.processor.texts(long)).all()
    assert "1 of 1 texts are longer than the 24 tokens" in caplog.text
    assert "'dog dog" in caplog.text
    caplog.clear()
    clip.processor.texts([fits, "a dog"])
    assert not caplog.text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("bf16", "bfloat16"),
        ("fp16", "float16"),
        ("half", "float16"),
        ("Float32", "float32"),
        ("float", "float32"),
        (float, "float32"),
        ("torch.bfloat16", "bfloat16"),
        (jnp.bfloat16, "bfloat16"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.float16, "float16"),
        (np.dtype("<f4"), "float32"),
    ],
)
def test_names_of_dtypes(value, expected):
    assert floating_dtype(value).name == expected


@pytest.mark.parametrize("value", ["int8", "bool", "float8_e4m3fn", "", 3, np.int32, object(), {}])
def test_what_is_no_dtype_of_a_model_is_refused(value):
    with pytest.raises(ConfigError, match="dtype: expected a floating-point dtype"):
        perception_jax.load("scenes-clip", dtype=value)


def test_float64_is_not_silently_float32():
    with pytest.raises(ConfigError, match="jax_enable_x64"):
        perception_jax.load("scenes-clip", dtype="float64")


def test_torch_dtypes_need_no_torch():
    """A stand-in: a type of a module called torch that shows itself as torch's do."""
    fake = type("dtype", (), {"__module__": "torch", "__repr__": lambda self: "torch.float16"})
    assert floating_dtype(fake()).name == "float16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": 3}, "checkpoint: expected a folder or file"),
        ({"source": ""}, "checkpoint: expected a folder or file"),
        ({"source": None}, "checkpoint: expected a folder or file"),
        ({"prefix": None}, "prefix: expected a string, found None"),
        ({"section": 1}, "section: expected a string"),
        ({"config": [1]}, "config: expected a file, a folder or a mapping"),
        ({"mesh": "2x2"}, "mesh: expected a jax.sharding.Mesh"),
    ],
)
def test_arguments_of_load(arguments, message):
    with pytest.raises(ConfigError, match=message):
        perception_jax.load(**({"source": "scenes-clip"} | arguments))


def test_export_takes_what_load_gives(clip, tmp_path):
    with pytest.raises(ConfigError, match="expected what `load` gives"):
        perception_jax.export(clip.model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
