"""Small torch files that describe endless work end in one error, in little time and memory."""

from __future__ import annotations

import pathlib
import struct
import zipfile
from collections.abc import Iterable

import numpy as np
import pytest

from perception_jax.errors import CheckpointError
from perception_jax.interop.torch_reader import open_torch
from tests.bounded import Outcome, outcomes
from tests.faults.test_interop_torch import DATA, GOOD, archive, legacy_head

MODULE = b"c__torch__\nM\n)\x81"
HEAD = b"\x80\x02"
HUGE = b"\x8a\x06\xff\xff\xff\xff\xff\x7f"  # 2 ** 47 - 1


def opened(paths: Iterable[pathlib.Path], **limits: int) -> list[Outcome]:
    return outcomes("perception_jax.interop.torch_reader", "open_torch", list(paths), **limits)


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def tensor(shape: bytes, strides: bytes, size: bytes = b"K\x06", offset: bytes = b"K\x00") -> bytes:
    """A state dict of one tensor, from pieces of pickle."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    head = HEAD + b"}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
    return head + storage + size + b"tQ" + offset + shape + strides + b"\x89NtRs."


def doubled(levels: int, close: bytes = b"\x86") -> bytes:
    """A tuple that holds the one before it twice: 2 ** levels values in few bytes."""
    return b"N" + levels * (b"q\x00h\x00" + close)


def long(bits: int) -> bytes:
    raw = (1 << bits).to_bytes(bits // 8 + 2, "little")
    return b"\x8b" + struct.pack("<I", len(raw)) + raw


PICKLES = {
    # Values that hold themselves, or each other many times.
    "a dict in itself under long names": HEAD
    + b"}q\x00("
    + b"".join(text(b"%03d" % k + b"n" * 330) + b"h\x00" for k in range(400))
    + b"u.",
    "a module in itself": HEAD + MODULE + b"q\x00}(" + text(b"m" * 300) + b"h\x00ub.",
    "modules held twice": HEAD
    + MODULE
    + b"q\x00"
    + 60 * (MODULE + b"}(" + text(b"a") + b"h\x00" + text(b"b") + b"h\x00ubq\x00")
    + b".",
    # What would become text, be hashed or be compared.
    "the name of a global": HEAD + doubled(60) + doubled(60) + b"\x93.",
    "the name of a device": HEAD + b"ctorch\ndevice\n" + doubled(60) + b"\x85R.",
    "the name of a storage": GOOD.replace(b"X\x01\x00\x00\x000", doubled(60), 1),
    "a deep shape": tensor(doubled(60), doubled(60)),
    "a deep value where a dict belongs": HEAD + doubled(100_000, b"\x85") + b"}b.",
    "deep lists": HEAD + b"(" * 200_000 + b"l" * 200_000 + b".",
    # Sizes.
    "a huge key": HEAD + b"}" + long(80_000) + b"Ns.",
    "a huge size": tensor(long(80_000) + b"\x85", b"K\x01\x85"),
    "a huge product": tensor(b"(" + 30 * HUGE + b"t", b"(" + 30 * b"K\x00" + b"t"),
    "an empty tensor of huge sides": tensor(
        b"(K\x00" + 5 * HUGE + b"t", b"(" + 6 * b"K\x00" + b"t"
    ),
    "a terabyte by strides of zero": tensor(
        b"\x8a\x06" + (2**38).to_bytes(6, "little") + b"\x85", b"K\x00\x85"
    ),
    "a storage larger than its bytes": tensor(
        b"K\x06\x85", b"K\x01\x85", size=b"J" + struct.pack("<i", 2**30)
    ),
    # Quadratic time and memory.
    "colliding keys": HEAD
    + b"}("
    + b"".join(
        b"\x8a\x0c" + (k * (2**61 - 1)).to_bytes(12, "little") + b"N" for k in range(1, 40_000)
    )
    + b"u.",
    "colliding places in the memo": HEAD
    + b"N"
    + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(1, 40_000))
    + b".",
    "marks above a tall stack": HEAD + b"N" * 400_000 + b"(1" * 100_000 + b".",
    "copies of a long list": HEAD
    + b"]("
    + b"K\x01" * 200_000
    + b"eq\x00"
    + b"ctorch\nSize\nq\x010"
    + b"h\x01h\x00\x85R" * 20_000
    + b".",
    "copies of a long dict": HEAD
    + b"]("
    + b"".join(b"J" + struct.pack("<i", k) + b"N\x86" for k in range(100_000))
    + b"eq\x00ccollections\nOrderedDict\nq\x010"
    + b"h\x01h\x00\x85R" * 20_000
    + b".",
    "a mark in the memo": HEAD + b"(q\x00h\x00h\x00tt.",
    "a mark twice": HEAD + b"(22tt.",
}
CLAIMS = {
    "a string of 2 ** 62 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**62),
    "a number of 2 GB": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1),
}


def test_pickles(tmp_path):
    """In archives, where a few bytes may be a megabyte of pickle; old files claim lengths."""
    files = {}
    for number, (name, pickled) in enumerate(PICKLES.items()):
        path = tmp_path / f"{number}.pt"
        files[name] = archive(path, pickled, compression=zipfile.ZIP_DEFLATED)
    for name, pickled in CLAIMS.items():
        files[name] = tmp_path / f"{name}.bin"
        files[name].write_bytes(legacy_head() + pickled)
    for name, end in zip(files, opened(files.values()), strict=True):
        assert end.kind == "PerceptionError", (name, end)
        assert len(end.message) < 600, (name, end)


def zipped(path, entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in entries:
            file.writestr(f"archive/{name}", content)
    return path


def lying(path, name: bytes, size: int):
    """The archive with another unpacked size of an entry in its directory and local header."""
    raw = bytearray(path.read_bytes())
    for mark, to_size, to_name in ((b"PK\x01\x02", 24, 46), (b"PK\x03\x04", 22, 30)):
        start = raw.index(name) - to_name if mark == b"PK\x03\x04" else raw.rindex(name) - to_name
        assert raw[start : start + 4] == mark
        raw[start + to_size : start + to_size + 4] = struct.pack("<I", size)
    path.write_bytes(raw)
    return path


def repeated(path, times: int):
    """An archive whose directory names one compressed entry many times, under other names."""
    zipped(path, [("data/0", bytes(8 * 2**20))])
    raw = path.read_bytes()
    start = raw.index(b"PK\x01\x02")
    end = raw.index(b"PK\x05\x06")
    line = raw[start:end]
    lines = b"".join(line.replace(b"data/0", b"da%04d" % k) for k in range(times))
    lines = lines.replace(b"archive/da", b"archi/data/")  # keeps the lengths
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, times, times, len(lines), start, 0)
    path.write_bytes(raw[:start] + lines + tail)
    return path


def test_archives(tmp_path):
    good, bomb = [("data.pkl", GOOD), ("data/0", DATA.tobytes())], bytes(100 * 2**20)
    pickled = [("data.pkl", HEAD + b"N" * (20 * 2**20)), good[1]]
    files = {
        "an inflating byteorder": zipped(tmp_path / "0.pt", [("byteorder", bomb), *good]),
        "one of a false size": lying(
            zipped(tmp_path / "1.pt", [("byteorder", bomb), *good]), b"archive/byteorder", 6
        ),
        "an inflating pickle": zipped(tmp_path / "2.pt", pickled),
        "a pickle of a false size": lying(
            zipped(tmp_path / "3.pt", pickled), b"archive/data.pkl", 100
        ),
        "an inflating storage": zipped(tmp_path / "4.pt", [good[0], ("data/0", bomb)]),
        "another method": zipped(tmp_path / "6.pt", good, zipfile.ZIP_LZMA),
        "the same bytes as many entries": repeated(tmp_path / "7.pt", 1000),
    }
    with pytest.warns(UserWarning, match="Duplicate name"):
        files["two entries of one name"] = zipped(tmp_path / "5.pt", [*good, good[1]])
    for name, end in zip(files, opened(files.values(), megabytes=96), strict=True):
        assert end.kind == "PerceptionError", (name, end)


def test_tensors_may_repeat_what_is_stored_within_bounds(tmp_path):
    """Tied weights and expanded buffers of real models are no attack."""
    pickled = tensor(b"K\x08K\x06\x86", b"K\x00K\x01\x86")
    files = open_torch(archive(tmp_path / "x.pt", pickled, compression=zipfile.ZIP_DEFLATED))
    np.testing.assert_array_equal(files["w"], np.broadcast_to(DATA, (8, 6)))


def test_two_tensors_of_one_name(tmp_path):
    """A dotted key and a nested dict can say the same; neither is dropped in silence."""
    one = GOOD[len(b"\x80\x02}") : -1]
    pickled = HEAD + b"}(" + text(b"a.b") + b"}" + one + text(b"a") + b"}" + text(b"b") + b"}"
    with pytest.raises(CheckpointError, match=r"one value for each name .*'a\.b'"):
        open_torch(archive(tmp_path / "x.pt", pickled + one + b"su."))
