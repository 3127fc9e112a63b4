"""Damaged, foreign and hostile checkpoint files: one clear error, never wrong numbers."""

from __future__ import annotations

import json
import struct

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import open_checkpoint, read_json
from perception_jax.interop.load import load_params
from perception_jax.interop.rules import identity_table
from perception_jax.interop.safetensors_io import SafetensorsFile, write_safetensors
from perception_jax.interop.tensors import LazyTensor, TensorSpec
from perception_jax.interop.writer import write_checkpoint

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16)}
ABSTRACT = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in ARRAYS.items()}
F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def lazy() -> list[LazyTensor]:
    return [
        LazyTensor(name, TensorSpec(array.shape, array.dtype), lambda array=array: array)
        for name, array in ARRAYS.items()
    ]


def load(path) -> dict[str, jax.Array]:
    return load_params(identity_table(ABSTRACT), open_checkpoint(path), ABSTRACT).params


def written(path, header, data=b"\x00" * 24, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "JSON header"),
        (b"\xff\xfe\x00", "JSON header"),
        (b"[" * 100_000, "JSON header"),
        ([1, 2], "JSON object"),
        (b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), "repeated key 'a'"),
        ({"a": F32, "__metadata__": {"x": 1}}, "__metadata__"),
        ({"a": F32, "__metadata__": {"crc32": "{"}}, "checksums"),
        ({"a": F32, "__metadata__": {"crc32": "[]"}}, "checksums"),
        ({"a": {"dtype": "F32"}}, "data_offsets"),
        ({"a": F32 | {"extra": 1}}, "data_offsets"),
        ({"a": F32 | {"dtype": "Q4_0"}}, "one of the dtypes"),
        ({"a": F32 | {"dtype": ["F32"]}}, "one of the dtypes"),
        ({"a": F32 | {"shape": [2, -3]}}, "shape of tensor 'a'"),
        ({"a": F32 | {"shape": [2, True]}}, "shape of tensor 'a'"),
        ({"a": F32 | {"shape": [1] * 40 + [6]}}, "shape of tensor 'a'"),
        ({"a": F32 | {"shape": [0, 10**30], "data_offsets": [0, 0]}}, "shape of tensor 'a'"),
        ({"a": F32 | {"shape": [3, 3]}}, "Expected 36 bytes"),
        ({"a": F32 | {"data_offsets": [0, 12, 24]}}, "two data_offsets"),
        ({"a": F32 | {"data_offsets": [24, 0]}}, r"range \[24, 0\]"),
        ({"a": F32, "b": F32}, "overlaps"),
        ({"a": F32 | {"data_offsets": [4, 28]}}, "gap"),
    ],
)
def test_headers(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(written(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize("length", [2**63, 2**40, 0, 10])
def test_header_lengths(tmp_path, length):
    with pytest.raises(CheckpointError, match="header"):
        SafetensorsFile(written(tmp_path / "x.safetensors", {"a": F32}, length=length))


@pytest.mark.parametrize("size", [0, 5, 8, 100, -1, 1])
def test_truncated_and_extended_files(tmp_path, size):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, lazy())
    raw = path.read_bytes()
    path.write_bytes(raw + b"\x00" if size == 1 else raw[:size])
    with pytest.raises(CheckpointError, match=str(path)):
        load(tmp_path)


def test_a_file_cut_after_it_was_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, lazy())
    files = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="another process"):
        files["b"]


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    """Our own files carry checksums, so no flip gives wrong numbers."""
    path = tmp_path / "model.safetensors"
    write_safetensors(path, lazy())
    raw = path.read_bytes()
    noticed = 0
    for position in range(len(raw)):
        damaged = bytearray(raw)
        damaged[position] ^= 0x11
        path.write_bytes(damaged)
        try:
            params = load(path)
        except CheckpointError:
            noticed += 1
            continue
        for name, array in ARRAYS.items():
            assert params[name].tobytes() == array.tobytes(), position
    assert noticed >= len(raw) // 2


def test_the_checksum_names_the_damaged_tensor(tmp_path):
    write_checkpoint(tmp_path / "m", lazy(), max_shard_bytes=24)
    path = tmp_path / "m" / "model-00002-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"CRC-32 .*'b' in .*model-00002"):
        load(tmp_path / "m")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_noise(tmp_path_factory, noise):
    for name in ("x.safetensors", "x.bin", "x.pt"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(noise)
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_shards(tmp_path):
    folder = tmp_path / "m"
    write_checkpoint(folder, lazy(), max_shard_bytes=24)
    index = folder / "model.safetensors.index.json"
    original = read_json(index)
    second = folder / "model-00002-of-00002.safetensors"
    content = second.read_bytes()

    second.unlink()
    with pytest.raises(CheckpointError, match=r"2 shards .*missing: model-00002-of-00002"):
        load(folder)
    second.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"'a' in .*model-00001.*model-00002"):
        load(folder)
    second.write_bytes(content)
    index.write_text(json.dumps({"weight_map": original["weight_map"] | {"c": second.name}}))
    with pytest.raises(CheckpointError, match=r"1 nowhere, e\.g\. 'c'"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../m/" + second.name}}))
    with pytest.raises(CheckpointError, match="plain file names"):
        load(folder)
    for broken in ("{", "[]", "{}", '{"weight_map": {"a": 1}}'):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match="index"):
            load(folder)


def test_nothing_to_read(tmp_path):
    with pytest.raises(CheckpointError, match="found nothing"):
        open_checkpoint(tmp_path / "missing.safetensors")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match=r"Expected weights in .*notes\.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="ends in"):
        open_checkpoint(tmp_path / "notes.txt")
