"""The restricted reader: hostile pickles are refused before anything runs, damage is named.

The files are made here by hand (protocol and all), so that torch is not needed.
"""

from __future__ import annotations

import io
import os
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.errors import CheckpointError
from perception_jax.interop.pickle_data import PickleData
from perception_jax.interop.torch_reader import open_torch

GOOD = b"".join(
    (
        b"\x80\x02}X\x01\x00\x00\x00w",  # {"w":
        b"ctorch._utils\n_rebuild_tensor_v2\n(",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06t",
        b"QK\x00K\x02K\x03\x86K\x03K\x01\x86\x89N",  # offset 0, shape (2, 3), strides (3, 1)
        b"tRs.",
    )
)
DATA = np.arange(6, dtype=np.float32)


def archive(path: pathlib.Path, pickled: bytes, data: bytes = DATA.tobytes(), **options):
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", b"little")
        file.writestr("archive/data/0", data)
    return path


class Attack:
    """Unpickled by Python, this calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def test_the_file_made_by_hand_is_a_good_one(tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        files = open_torch(archive(tmp_path / "x.pt", GOOD, compression=compression))
        assert list(files) == ["w"]
        files.check("w")
        np.testing.assert_array_equal(files["w"], DATA.reshape(2, 3))
        assert not files["w"].flags.writeable


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, r"posix\.system"), (eval, r"(builtins|__builtin__)\.eval")],
)
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_call_of_anything_else_is_refused_before_it_runs(
    tmp_path, function, name, protocol, container
):
    proof = tmp_path / "proof"
    command = f"touch {proof}" if function is os.system else f"open({str(proof)!r}, 'w').close()"
    attack = pickle.dumps({"w": Attack(function, command)}, protocol)
    path = tmp_path / "x.bin"
    if container == "zip":
        archive(path, attack)
    else:
        path.write_bytes(legacy_head() + attack)
    with pytest.raises(CheckpointError, match=f"found the global {name}"):
        open_torch(path)
    assert not proof.exists()
    pickle.loads(attack)  # the attack is real: Python's own unpickler runs it
    assert proof.exists()


def legacy_head() -> bytes:
    system = {"little_endian": True}
    return b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, system))


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x04\x8c\x05torch\x8c\x0eos.path.system\x93)R.", "torch.os.path.system"),
        (b"(iposix\nsystem\n.", "instruction INST"),
        (b"(cposix\nsystem\no.", "posix.system"),
        (b"(ctorch\nSize\no.", "instruction OBJ"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x04ctorch\nSize\n)}\x92.", "instruction NEWOBJ_EX"),
        (b"\x80\x02}X\x01\x00\x00\x00a)R.", "a call of something that is a str"),
        (b"ctorch\nFloatStorage\n)R.", "a call of something that is a Symbol"),
        (b"ctorch\nSize\n}(X\x04\x00\x00\x00makecposix\nsystem\nub.", "posix.system"),
        (b"ctorch\nSize\n}b.", "a state for a Function"),
        (b"c__torch__.M\nM\n)\x81K\x01b.", "a state for a ScriptObject"),
        (b"\x80\x02}))s.", "dict key of type tuple"),
        (b"\x80\x02K\x01K\x02a.", "expected a list"),
        (b"\x80\x02h\x05.", "well-formed"),
        (b"\x80\x02.", "well-formed"),
        (b"\x80\x02t.", "well-formed"),
        (b"\x80\x02(.", "a mark where"),
        (b"\x80\x02K\x01", "truncated|exhausted"),
        (b"", "exhausted"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))\x89NtR.", "without a storage"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "missing"),
        (b"X\x01\x00\x00\x00aQ.", "well-formed"),
        (b"c__builtin__\nlist\n)R.", "a call of something that is a Symbol"),
        (b"ccollections\ndefaultdict\ncposix\nsystem\n\x85R.", "posix.system"),
        (b"ccollections\ndefaultdict\nK\x01\x85R.", "a defaultdict of a int"),
        (b"ccollections\ndefaultdict\n)R}b.", "found none"),
    ],
)
def test_instructions_that_are_not_data(tmp_path, pickled, message):
    with pytest.raises(CheckpointError, match=message):
        open_torch(archive(tmp_path / "x.pt", pickled))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x02K\x03\x86K\x03", b"K\x03K\x03\x86K\x03", "Expected 36 bytes of storage '0'"),
        (b"QK\x00", b"QK\x01", "Expected 28 bytes of storage '0'"),
        (b"\x00\x00\x000X", b"\x00\x00\x001X", "storage '1' .* found None"),
        (b"K\x03K\x01\x86\x89", b"K\x03\x85\x89", "other strides than axes"),
        (b"FloatStorage", b"QUInt8Storage", "torch.QUInt8Storage"),
        (b"_rebuild_tensor_v2", b"_rebuild_sparse_tensor", "_rebuild_sparse_tensor"),
        (b"storagec", b"steragec", "well-formed"),
        (b"}X\x01\x00\x00\x00w", b"}N", r"one dict of tensors .*, found none"),
    ],
)
def test_tensors_that_do_not_fit_the_file(tmp_path, old, new, message):
    assert GOOD.count(old) == 1
    with pytest.raises(CheckpointError, match=message):
        open_torch(archive(tmp_path / "x.pt", GOOD.replace(old, new)))


def test_damaged_archives(tmp_path):
    path = archive(tmp_path / "x.pt", GOOD)
    raw = path.read_bytes()
    start = raw.index(DATA.tobytes())
    path.write_bytes(raw[: start + 8] + b"\x01" + raw[start + 9 :])
    files = open_torch(path)
    with pytest.raises(CheckpointError, match=r"CRC-32 .*archive/data/0"):
        files.check("w")
    for size in (100, start + 3, len(raw) - 5):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match="Copy the file again"):
            open_torch(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("weights.npy", b"")
    with pytest.raises(CheckpointError, match="not made by torch"):
        open_torch(path)
    path.write_bytes(raw.replace(b"little", b"bigend"))
    with pytest.raises(CheckpointError, match=r"CRC|little-endian"):
        open_torch(path)


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", b"", b"\x80\x02K\x01."],
)
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_torch(path)


def test_a_choice_of_state_dicts_is_left_to_the_user(tmp_path):
    tensor = GOOD[len(b"\x80\x02}") : -2]  # "w", tensor
    nested = b"\x80\x02}(" + b"".join(
        b"X%s%s}%ss" % (len(name).to_bytes(4, "little"), name, tensor)
        for name in (b"student", b"teacher")
    )
    path = archive(tmp_path / "x.pt", nested + b"u.")
    with pytest.raises(CheckpointError, match=r"student.*teacher.*`section`"):
        open_torch(path)
    assert list(open_torch(path, section="teacher")) == ["w"]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(GOOD)))
def test_noise_is_never_more_than_data(noise, cut):
    """Whatever the bytes say, the interpreter ends with plain data or one error."""

    def storage(value):
        raise ValueError(value)

    for pickled in (noise, GOOD[:cut] + noise, noise + GOOD[cut:]):
        try:
            value = PickleData("noise", {}, storage).read(io.BytesIO(pickled))
        except CheckpointError:
            continue
        assert isinstance(value, int | float | str | bytes | list | tuple | dict | None)


def test_any_flipped_byte_of_an_archive_is_noticed_or_harmless(tmp_path):
    path = archive(tmp_path / "x.pt", GOOD)
    raw = path.read_bytes()
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 0x11
        path.write_bytes(damaged)
        try:
            files = open_torch(path)
            for name in files:
                files.check(name)
        except CheckpointError:
            continue
        assert list(files) == ["w"], position
        assert files["w"].tobytes() == DATA.tobytes(), position


def test_a_small_file_that_describes_endlessly_many_modules(tmp_path):
    """Each module holds the one before it twice."""
    head = b"\x80\x02c__torch__\nM\n)\x81q\x00"
    level = b"c__torch__\nM\n)\x81}(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ubq\x00"
    with pytest.raises(CheckpointError, match="nested values"):
        open_torch(archive(tmp_path / "x.pt", head + 60 * level + b"."))
