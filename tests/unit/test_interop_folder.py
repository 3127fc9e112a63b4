"""Checkpoint folders: what is written, what other readers make of it, what is found in a folder."""

from __future__ import annotations

import json
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import open_checkpoint, read_json
from perception_jax.interop.safetensors_io import SafetensorsFile, write_safetensors
from perception_jax.interop.tensors import DTYPES, LazyTensor, TensorSpec
from perception_jax.interop.writer import write_checkpoint


def lazy(arrays: dict[str, np.ndarray]) -> list[LazyTensor]:
    return [
        LazyTensor(name, TensorSpec(array.shape, array.dtype), lambda array=array: array)
        for name, array in arrays.items()
    ]


ARRAYS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a.weight": np.arange(4, dtype=np.int64),
    "scalar": np.array(2.5, np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "ünïcode": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)


def test_written_files_are_read_by_safetensors_and_by_us(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, lazy(ARRAYS), {"format": "pt"})
    assert_equal(safetensors.numpy.load_file(path), ARRAYS)
    file = SafetensorsFile(path)
    assert_equal(file, ARRAYS)
    assert file.metadata["format"] == "pt"
    for name in file:
        file.check(name)
    assert not file["b"].flags.writeable


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_survives(tmp_path, dtype):
    array = np.array([0, 1, 1, 0]).astype(dtype)
    write_safetensors(tmp_path / "x.safetensors", lazy({"x": array}))
    assert_equal(SafetensorsFile(tmp_path / "x.safetensors"), {"x": array})


def test_files_of_safetensors_itself_are_read(tmp_path):
    arrays = {k: v for k, v in ARRAYS.items() if v.flags.c_contiguous}
    arrays["half"] = np.array([1.5, -2], ml_dtypes.bfloat16)
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    assert_equal(open_checkpoint(tmp_path), arrays)


def test_shards_hold_at_most_so_many_bytes(tmp_path):
    arrays = {f"w{k}": np.full((10,), k, np.float32) for k in range(5)}
    write_checkpoint(tmp_path / "m", lazy(arrays), {"depth": 2}, max_shard_bytes=100)
    names = sorted(item.name for item in (tmp_path / "m").iterdir())
    shards = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert names == ["config.json", *shards, "model.safetensors.index.json"]
    index = read_json(tmp_path / "m" / "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": 200}
    assert [index["weight_map"][f"w{k}"][10] for k in range(5)] == ["1", "1", "2", "2", "3"]
    assert_equal(open_checkpoint(tmp_path / "m"), arrays)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    arrays = {"a": np.zeros(3, np.float32), "b": np.zeros(99, np.float32), "c": np.zeros(3)}
    write_checkpoint(tmp_path / "m", lazy(arrays), max_shard_bytes=50)
    index = read_json(tmp_path / "m" / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) == 3


def test_the_writer_holds_one_tensor_at_a_time(tmp_path):
    alive, most = set(), 0

    def make(name):
        nonlocal most
        array = np.zeros(4, np.float32)
        alive.add(name)
        most = max(most, len(alive))
        weakref.finalize(array, alive.discard, name)
        return array

    spec = TensorSpec((4,), np.dtype(np.float32))
    tensors = [LazyTensor(str(k), spec, lambda k=k: make(str(k))) for k in range(5)]
    write_checkpoint(tmp_path / "m", tensors)
    assert most <= 2  # the one being written and the next one being made


def test_extra_files_and_configuration(tmp_path):
    write_checkpoint(
        tmp_path / "deep" / "m",
        lazy(ARRAYS),
        {"name": "Größe"},
        {"vocab.json": {"a": 1}, "merges.txt": "a b\n", "raw.bin": b"\x00"},
    )
    folder = tmp_path / "deep" / "m"
    assert read_json(folder / "config.json") == {"name": "Größe"}
    assert json.loads((folder / "vocab.json").read_text()) == {"a": 1}
    assert (folder / "merges.txt").read_text() == "a b\n"
    assert (folder / "raw.bin").read_bytes() == b"\x00"
    assert folder.stat().st_mode & 0o777 == (tmp_path / "deep").stat().st_mode & 0o777


def test_safetensors_come_before_other_formats(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    write_safetensors(tmp_path / "open_clip_model.safetensors", lazy(ARRAYS))
    assert_equal(open_checkpoint(tmp_path), ARRAYS)


def test_a_single_file_of_any_name_is_found_and_two_are_refused(tmp_path):
    write_safetensors(tmp_path / "weights.safetensors", lazy(ARRAYS))
    assert_equal(open_checkpoint(tmp_path), ARRAYS)
    write_safetensors(tmp_path / "other.safetensors", lazy(ARRAYS))
    with pytest.raises(CheckpointError, match=r"other\.safetensors.*weights\.safetensors"):
        open_checkpoint(tmp_path)
    assert_equal(open_checkpoint(tmp_path / "other.safetensors"), ARRAYS)
