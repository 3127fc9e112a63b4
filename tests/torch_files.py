"""Files as `torch.save` writes them, made by hand so that torch is not needed."""

from __future__ import annotations

import pathlib
import struct
import zipfile
from collections.abc import Mapping

import numpy as np


def save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> pathlib.Path:
    """A zip archive with a state dict of float32 tensors."""
    items = b"".join(
        _text(name) + _tensor(str(key), array) for key, (name, array) in enumerate(arrays.items())
    )
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}(" + items + b"u.")
        file.writestr("archive/byteorder", b"little")
        for key, array in enumerate(arrays.values()):
            file.writestr(f"archive/data/{key}", array.astype(np.float32).tobytes())
    return path


def _tensor(key: str, array: np.ndarray) -> bytes:
    strides = np.array(np.zeros(array.shape, np.int8).strides, np.int64)
    storage = b"(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text(key) + _text("cpu")
    return b"".join(
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            storage + _number(array.size) + b"tQ",
            b"K\x00" + _numbers(array.shape) + _numbers(strides),
            b"\x89NtR",
        )
    )


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _numbers(values) -> bytes:
    return b"(" + b"".join(_number(int(value)) for value in values) + b"t"
