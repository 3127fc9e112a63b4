"""Hand-computed cases of geometry and preprocessing, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from perception_jax.api import Processor
from perception_jax.data import views
from perception_jax.data.geometry import Geometry
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.resizing import exact_part
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.data.transforms import ImageTextTransform
from perception_jax.errors import ConfigError, ImageError


def test_center_crop_of_a_wide_image():
    """80×40 → 20×10 → the middle 10×10: x' = x/4 - 5, y' = y/4."""
    geometry = ImageProcessor(size=10)(np.zeros((40, 80, 3), np.uint8)).geometry
    mapped = geometry.boxes(np.array([[20.0, 0.0, 60.0, 40.0], [0.0, 8.0, 24.0, 16.0]]))
    assert mapped.tolist() == [[0, 0, 10, 10], [-5, 2, 1, 4]]
    assert geometry.clip(mapped)[1].tolist() == [0, 2, 1, 4]
    shares = geometry.kept_share(np.array([[20.0, 0, 60, 40], [0, 8, 24, 16], [0, 0, 9, 9]]))
    np.testing.assert_allclose(shares, [1, 1 / 6, 0])


@pytest.mark.parametrize(
    "settings",
    [
        *(
            {"mode": mode, "resize": n}
            for mode in ("hf_crop", "tv_crop", "llava_pad")
            for n in (0, 37)
        ),
        {"mode": "squash"},
        {"mode": "hf_crop", "resizes": False},
        {"mode": "whole", "longest": 60, "multiple": 8},
    ],
    ids=str,
)
def test_what_a_size_alone_says_of_boxes_is_what_the_pixels_show(settings):
    """A white box on black: its white in the processed image over its area at that scale."""
    settings = {**settings, "resize": settings.get("resize") or None}
    processor = ImageProcessor(size=32, pad_colour=(0, 0, 0), **settings)
    rng = np.random.default_rng(1)
    for width, height in ((50, 50), (97, 41), (41, 98), (33, 200), (320, 213)):
        geometry = processor.geometry(width, height)
        corners = np.sort(rng.uniform(0, 1, (8, 2, 2)), axis=1) * [width - 9, height - 9]
        boxes = np.round(corners + np.array([[0, 0], [9, 9]])).reshape(-1, 4)
        for box, share in zip(boxes.astype(int), geometry.kept_share(boxes), strict=True):
            image = np.zeros((height, width, 3), np.uint8)
            image[box[1] : box[3], box[0] : box[2]] = 255
            white = processor(image).pixels[..., 0].sum(dtype=np.float64) / 255
            mapped = geometry.boxes(box[None].astype(np.float64))[0]
            assert abs(white - share * np.prod(mapped[2:] - mapped[:2])) <= 0.02 * 32**2


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
    with pytest.raises(ImageError, match="would become 300000×300000 in mode"):
        ImageProcessor(size=224, mode="llava_pad")(image)


def test_computing_only_the_kept_part_gives_the_same_picture(monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (33, 90, 3), np.uint8)
    whole = ImageProcessor(size=24, resize=30)(image)
    monkeypatch.setattr("perception_jax.data.processors._MAX_RESIZED", 1)
    part = ImageProcessor(size=24, resize=30)(image)
    assert part.geometry == whole.geometry
    assert np.abs(part.pixels.astype(int) - whole.pixels).max() <= 1


def whole_and_cropped(processor: ImageProcessor, image: np.ndarray) -> np.ndarray:
    picture = PIL.Image.fromarray(image)
    steps = processor._steps(*picture.size)
    (left, top), (width, height) = steps.corner, steps.resizing.target
    whole = picture.resize(steps.full, PIL.Image.Resampling[processor.resample.upper()])
    return np.array(whole.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_only_the_kept_part_is_resized_where_that_is_bit_equal(resample):
    part = functools.partial(exact_part, resample=resample)
    assert part((640, 480), (448, 336), (56, 0), (336, 336)) == (80, 0, 560, 480)
    assert part((36, 24), (504, 336), (84, 0), (336, 336)) == (6, 0, 30, 24)
    assert part((640, 427), (503, 336), (83, 0), (336, 336)) is None  # float32
    assert part((336, 400), (336, 400), (0, 32), (336, 336)) is None  # as it is
    found = 0
    for size, height, width in itertools.product((7, 12, 21), (9, 16, 36), range(5, 80)):
        processor = ImageProcessor(size=size, resample=resample)
        image = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
        expected = whole_and_cropped(processor, image)
        np.testing.assert_array_equal(processor(image).pixels, expected)
        steps = processor._steps(width, height)
        found += part((width, height), steps.full, steps.corner, (size, size)) is not None
    assert found > 100


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
        ({"do_rescale": False}, "do_rescale"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"resample": 0}, "bicubic"),
        ({"crop_size": {"height": 28, "width": 20}}, "square"),
        ({"size": {"shortest_edge": 20}}, "larger than"),
        ({"do_center_crop": False, "do_pad": True}, "size_divisor"),
        ({"size_divisor": 32}, "size_divisor without do_pad"),
        ({"size": {"shortest_edge": 28, "longest_edge": 40}}, "longest_edge"),
        ({"do_resize": False, "crop_size": None}, "crop_size"),
        ({"perception_jax_decode": {"alpha": "black"}}, "alpha: expected one of 'white', 'drop'"),
        ({"size": {"height": 40, "width": 40}}, "shortest_edge"),
        ({"size": {"longest_edge": 40}}, "square"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order = True is not supported"),
        ({"do_grayscale": True}, "do_grayscale"),
        ({"crop_pct": 0.8}, "crop_pct = 0.8"),
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


def test_the_whole_image_keeps_its_proportions():
    """40×90 → 20×45, padded to multiples of 14 at the right and at the bottom."""
    image = np.full((90, 40, 3), 200, np.uint8)
    plain = ImageProcessor(size=20, mode="whole")(image)
    assert plain.pixels.shape == (45, 20, 3)
    assert plain.geometry.boxes(np.array([[4.0, 10, 40, 90]])).tolist() == [[2, 5, 20, 45]]
    padded = ImageProcessor(size=20, mode="whole", multiple=14, pad_colour=(1, 2, 3))(image)
    assert padded.pixels.shape == (56, 28, 3)
    np.testing.assert_array_equal(padded.pixels[:45, :20], plain.pixels)
    assert padded.pixels[45:].reshape(-1, 3).tolist() == [[1, 2, 3]] * (11 * 28)
    assert padded.pixels[:, 20:].reshape(-1, 3).tolist() == [[1, 2, 3]] * (8 * 56)
    assert padded.geometry.window == (0, 0, 20, 45)
    exact = ImageProcessor(size=20, mode="whole", multiple=5)(image)
    assert exact.pixels.shape == (45, 20, 3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((427, 640), (800, 1199)),
        ((200, 900), (296, 1333)),
        ((9, 5), (1333, 741)),
    ],
)
def test_the_longest_side_is_limited_as_in_detr(size, expected):
    """Shortest side 800, longest at most 1333; where the limit bites, 1333 · short / long."""
    image = np.zeros((*size, 3), np.uint8)
    processor = ImageProcessor(size=800, mode="whole", longest=1333)
    assert processor(image).pixels.shape[:2] == expected


def test_without_resizing():
    """The image as it is, or a crop out of it, filled up with black where it is too small."""
    image = np.random.default_rng(0).integers(1, 256, (8, 14, 3), np.uint8)
    whole = ImageProcessor(size=8, mode="whole", resizes=False)(image)
    np.testing.assert_array_equal(whole.pixels, image)
    hf, tv = (ImageProcessor(size=11, mode=m, resizes=False)(image) for m in ("hf_crop", "tv_crop"))
    assert hf.pixels.shape == tv.pixels.shape == (11, 11, 3)
    np.testing.assert_array_equal(hf.pixels[2:10], image[:, 1:12])
    np.testing.assert_array_equal(tv.pixels[1:9], image[:, 2:13])
    assert not hf.pixels[[0, 1, 10]].any()
    assert hf.geometry.window == (0, 2, 11, 10)
    assert hf.geometry.boxes(np.array([[1.0, 0, 12, 8]])).tolist() == [[0, 2, 11, 10]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "whole", "resize": 30}, "no crop"),
        ({"mode": "whole", "longest": 20}, "at least the shortest side, 28"),
        ({"mode": "squash", "resizes": False}, "resizes, and so do"),
        ({"mode": "llava_pad", "resizes": False}, "resizes, and so do"),
        ({"resizes": False, "resize": 30}, "resizes, and so do"),
        ({"longest": 40}, "no use for `longest`"),
        ({"mode": "squash", "multiple": 2}, "no use for"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ConfigError, match=message):
        ImageProcessor(size=28, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "whole"},
        {"mode": "whole", "longest": 40},
        {"mode": "whole", "resizes": False},
        {"mode": "hf_crop", "resizes": False},
        {"mode": "tv_crop", "resizes": False, "exif": False, "alpha": "drop_resized"},
        {"mode": "squash", "alpha": "drop"},
        {"mode": "whole", "multiple": 14, "pad_colour": (122, 116, 104)},
    ],
)
def test_every_processor_survives_a_file(fields):
    processor = ImageProcessor(size=28, **fields)
    assert ImageProcessor.from_hf(processor.to_hf(ours=True)) == processor
    nested = {"image_processor": processor.to_hf(ours=True)}
    again = ImageProcessor.from_hf(nested, ImageProcessor(size=14))
    assert again.size == (14 if processor.mode == "whole" and not processor.resizes else 28)
    if processor.multiple > 1:
        with pytest.raises(ConfigError, match="'jax' layout"):
            processor.to_hf()


def test_the_whole_of_a_very_long_image_needs_a_limit():
    image = np.zeros((1, 300_000, 3), np.uint8)
    with pytest.raises(ImageError, match="set `longest`"):
        ImageProcessor(size=224, mode="whole")(image)
    assert ImageProcessor(size=224, mode="whole", longest=448)(image).pixels.shape == (1, 448, 3)


def test_images_of_many_sizes_are_not_stacked():
    processor = Processor(image=ImageProcessor(size=8, mode="whole"), tokenizer=None)
    tall, wide = (np.zeros((*size, 3), np.uint8) for size in ((20, 10), (10, 20)))
    assert processor.images([tall, tall]).shape == (2, 16, 8, 3)
    with pytest.raises(ConfigError, match=r"several sizes \(16×8, 8×16\)"):
        processor.images([tall, wide])
    with pytest.raises(ConfigError, match="images of many sizes"):
        ImageTextTransform(processor=processor.image, tokenizer=ClipTokenizer.shipped(context=8))
    with pytest.raises(ConfigError, match="images of many sizes"):
        views.view(processor.image, tall, patch=4, side=8)


def rgba() -> PIL.Image.Image:
    """Opaque, half transparent and invisible colours."""
    pixels = np.random.default_rng(3).integers(0, 256, (40, 52, 4), np.uint8)
    pixels[:, :20, 3], pixels[:, 20:30, 3] = 255, 0
    return PIL.Image.fromarray(pixels)


@pytest.mark.parametrize("mode", ["hf_crop", "squash"])
def test_transparency(mode):
    """On white; dropped as the file is opened; dropped behind Pillow's own resizing of RGBA."""
    picture = rgba()
    plain = ImageProcessor(size=20, mode=mode)
    white = PIL.Image.new("RGBA", picture.size, "white")
    white = PIL.Image.alpha_composite(white, picture).convert("RGB")
    side = (20, 20) if mode == "squash" else (26, 20)
    resized = picture.resize(side, PIL.Image.Resampling.BICUBIC)
    resized = resized if mode == "squash" else resized.crop((3, 0, 23, 20))
    expected = {
        "white": plain(np.asarray(white)).pixels,
        "drop": plain(np.asarray(picture.convert("RGB"))).pixels,
        "drop_resized": np.asarray(resized.convert("RGB")),
    }
    content = io.BytesIO()
    picture.save(content, "PNG")
    for alpha, wanted in expected.items():
        processor = dataclasses.replace(plain, alpha=alpha)
        for image in (content.getvalue(), picture):
            np.testing.assert_array_equal(processor.read(image).pixels, wanted, alpha)
    assert len({value.tobytes() for value in expected.values()}) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_where_the_reference_does(orientation):
    pixels = np.random.default_rng(3).integers(0, 256, (40, 20, 3), np.uint8)
    exif, content = PIL.Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    PIL.Image.fromarray(pixels).save(content, "PNG", exif=exif)
    with PIL.Image.open(content) as picture:
        upright = np.asarray(PIL.ImageOps.exif_transpose(picture))
    for alpha in ("white", "drop", "drop_resized"):
        stored = ImageProcessor(size=20, mode="squash", exif=False, alpha=alpha)
        turned = dataclasses.replace(stored, exif=True)
        raw = content.getvalue()
        np.testing.assert_array_equal(stored.read(raw).pixels, stored(pixels).pixels)
        np.testing.assert_array_equal(turned.read(raw).pixels, stored(upright).pixels)


def test_other_colour_modes_behind_resizing_are_no_error():
    grey = np.arange(40 * 30, dtype=np.uint16).reshape(40, 30) * 50
    pictures = [PIL.Image.fromarray(grey), rgba().convert("LA"), rgba().convert("P")]
    pictures += [rgba().convert("CMYK"), rgba().convert("L"), rgba().convert("1")]
    processor = ImageProcessor(size=20, alpha="drop_resized")
    for picture in pictures:
        assert processor.read(picture).pixels.shape == (20, 20, 3), picture.mode
    with pytest.raises(ImageError, match="32-bit float"):
        processor.read(PIL.Image.fromarray(np.zeros((4, 4), np.float32)))
