"""Images of every awkward kind: decoded as documented, or an `ImageError` that names them."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest

from perception_jax.data import images
from perception_jax.errors import ImageError

GRADIENT = np.indices((30, 40, 3), np.uint8) * np.array([7, 5, 60], np.uint8)[:, None, None, None]
GRADIENT = GRADIENT.sum(0, dtype=np.uint8)


def encoded(picture: PIL.Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(image, **options) -> np.ndarray:
    """What `images.decode` gives, or raises; `decode_picture` must do the same."""
    try:
        pixels = images.decode(image, **options)
    except ImageError:
        with pytest.raises(ImageError):
            images.decode_picture(image, **options)
        raise
    np.testing.assert_array_equal(np.asarray(images.decode_picture(image, **options)), pixels)
    return pixels


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG"])
def test_formats(kind, tmp_path):
    flat = PIL.Image.new("RGB", (5, 3), (200, 100, 50))
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(encoded(flat, kind, **options))
    for pixels in (decode(path), decode(path.read_bytes())):
        assert pixels.shape == (3, 5, 3)
        assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= (3 if kind == "JPEG" else 0)


def test_lossless_pixels_are_exact_and_an_array_passes_through():
    assert np.array_equal(decode(encoded(PIL.Image.fromarray(GRADIENT), "PNG")), GRADIENT)
    assert decode(GRADIENT) is GRADIENT


def test_cmyk_jpeg():
    data = encoded(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert np.abs(decode(data).astype(int) - (255, 0, 0)).max() <= 4


def test_16_bit_keeps_the_high_byte():
    grey = np.array([[0, 255, 256, 65535]], np.uint16)
    pixels = decode(encoded(PIL.Image.fromarray(grey), "PNG"))
    assert pixels.tolist() == [[[0] * 3, [0] * 3, [1] * 3, [255] * 3]]


def test_float_pixels_are_refused():
    data = encoded(PIL.Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")
    with pytest.raises(ImageError, match="float"):
        decode(data)


def test_transparency_becomes_white():
    alpha = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    pixels = decode(encoded(PIL.Image.fromarray(alpha), "PNG"))
    assert pixels.tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    pixels = decode(encoded(palette, "PNG", transparency=b"\xff\x00"))
    assert pixels.tolist() == [[[10, 20, 30], [255, 255, 255]]]
    keyed = PIL.Image.new("RGB", (1, 1), (1, 2, 3))
    assert decode(encoded(keyed, "PNG", transparency=(1, 2, 3))).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(PIL.Image.fromarray(GRADIENT), kind, exif=exif)
    pixels = decode(data)
    assert images.read_header(data) == images.Header((40, 30), orientation)
    assert images.read_size(data) == pixels.shape[1::-1]
    expected = {
        1: GRADIENT,
        2: GRADIENT[:, ::-1],
        3: GRADIENT[::-1, ::-1],
        4: GRADIENT[::-1],
        5: GRADIENT.transpose(1, 0, 2),
        6: np.rot90(GRADIENT, -1),
        7: np.rot90(GRADIENT.transpose(1, 0, 2), 2),
        8: np.rot90(GRADIENT),
    }[orientation]
    np.testing.assert_array_equal(pixels, expected)


def test_the_size_of_a_png_is_read_without_its_pixels(monkeypatch):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned, plain = (
        encoded(PIL.Image.fromarray(GRADIENT), "PNG", **more) for more in ({"exif": exif}, {})
    )
    start = turned.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", turned[start : start + 4])[0]
    behind = plain[: plain.index(b"IEND") - 4] + turned[start:end] + plain[-12:]
    assert images.read_size(behind) == (30, 40)
    assert decode(behind).shape == (40, 30, 3)

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(PIL.PngImagePlugin.PngImageFile, "load", load)
    assert images.read_size(plain) == (40, 30)
    assert images.read_size(turned) == (30, 40)


def test_damaged_exif_is_no_reason_to_lose_the_pixels():
    data = encoded(
        PIL.Image.fromarray(GRADIENT), "PNG", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xff"
    )
    assert decode(data).shape == GRADIENT.shape


def test_one_pixel_wide():
    assert decode(encoded(PIL.Image.new("L", (1, 5000)), "PNG")).shape == (5000, 1, 3)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
JPEG = encoded(PIL.Image.fromarray(NOISE), "JPEG")
BROKEN = {
    "truncated.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"this is not a picture", "not an image"),
    "header_only.png": (png_claiming(100, 100)[:40], "header is damaged"),
    "short.png": (png_claiming(100, 100), "truncated"),
    "bomb.png": (png_claiming(100_000, 100_000), "pixels"),
    "large.png": (png_claiming(12_000, 12_000), "12000×12000"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name, tmp_path):
    content, reason = BROKEN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        decode(path, name="record-7")
    assert str(path) in str(caught.value)
    assert "record-7" in str(caught.value)
    with pytest.raises(ImageError, match="record-7"):
        decode(content, name="record-7")


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for read in (images.decode, images.read_size):
        with pytest.raises(ImageError, match=r"a\.png: expected an image file, found a pipe"):
            read(tmp_path / "a.png")


def test_what_is_not_a_file_or_not_an_image_array(tmp_path):
    with pytest.raises(ImageError, match="found nothing"):
        decode(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="readable image file"):
        decode(tmp_path)
    for array in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ImageError, match=r"uint8\[H, W, 3\]"):
            decode(array)
    with pytest.raises(ImageError, match="4×4"):
        images.decode(np.zeros((4, 4, 3), np.uint8), max_pixels=15)


def test_every_truncation_either_decodes_whole_or_is_an_image_error():
    data = encoded(PIL.Image.fromarray(GRADIENT), "PNG")
    last = data.index(b"IEND") - 8  # the pixels end before it, with four bytes of checksum
    decoded = []
    for cut in [*range(0, len(data), 7), len(data)]:
        with contextlib.suppress(ImageError):
            np.testing.assert_array_equal(decode(data[:cut]), GRADIENT)
            decoded.append(cut)
    assert decoded
    assert min(decoded) > last - 4


def test_warning_filters_are_as_before_even_with_threads():
    noisy = encoded(PIL.Image.fromarray(GRADIENT), "TIFF")
    damaged = noisy[:4] + struct.pack("<I", len(noisy) - 20) + noisy[8:]

    def work() -> None:
        for _ in range(20):
            with contextlib.suppress(ImageError):
                decode(damaged)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == before
