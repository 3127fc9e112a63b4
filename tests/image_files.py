"""Image files and a check of sources, for the tests of their readers."""

from __future__ import annotations

import io
import pathlib
import pickle

import PIL.Image
import pytest

from perception_jax.data import images


def png(width: int = 8, height: int = 6, grey: int = 0) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: pathlib.Path, content: bytes | str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def assert_sound(source, count: int) -> None:
    """Random access, no wrapping, and the same after pickling."""
    assert len(source) == count
    for index in (-1, count):
        with pytest.raises(IndexError):
            source[index]
    again = pickle.loads(pickle.dumps(source))
    for index in range(count):
        one, other = source[index], again[index]
        assert one == other
        assert images.decode(one.image).shape == (6, 8, 3)
