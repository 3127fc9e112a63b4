"""A checkpoint folder is there whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from perception_jax.errors import CheckpointError
from perception_jax.interop.checkpoint_dir import open_checkpoint
from perception_jax.interop.tensors import LazyTensor, TensorSpec
from perception_jax.interop.writer import write_checkpoint


def lazy(value: float = 1.0, size: int = 1000) -> list[LazyTensor]:
    spec = TensorSpec((size,), np.dtype(np.float32))
    return [LazyTensor("w", spec, lambda: np.full(size, value, np.float32))]


def failing(error: Exception) -> list[LazyTensor]:
    def read():
        raise error

    return [*lazy(), LazyTensor("broken", TensorSpec((1,), np.dtype(np.float32)), read)]


def test_a_folder_with_files_is_kept_unless_asked(tmp_path):
    folder = tmp_path / "m"
    write_checkpoint(folder, lazy(1))
    with pytest.raises(CheckpointError, match="overwrite=True"):
        write_checkpoint(folder, lazy(2))
    assert open_checkpoint(folder)["w"][0] == 1
    (folder / "old.txt").touch()
    write_checkpoint(folder, lazy(2), overwrite=True)
    assert open_checkpoint(folder)["w"][0] == 2
    assert [item.name for item in folder.iterdir()] == ["model.safetensors"]
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, overwrite):
    if overwrite:
        write_checkpoint(tmp_path / "m", lazy(1))
    before = sorted(os.listdir(tmp_path))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CheckpointError, match=r"No space left(.|\n)*Nothing was written"):
        write_checkpoint(tmp_path / "m", failing(full), overwrite=overwrite)
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path / "m", failing(ZeroDivisionError()), overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == before
    if overwrite:
        assert open_checkpoint(tmp_path / "m")["w"][0] == 1


def test_a_file_that_the_system_refuses_to_grow(tmp_path):
    """A real refusal in the middle of a write: the limit on file sizes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            write_checkpoint(tmp_path / "m", lazy(size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"4000 bytes needed, 3999 free.*\. Free some space"):
        write_checkpoint(tmp_path / "m", failing(AssertionError())[:1])
    assert os.listdir(tmp_path) == []


def test_killed_in_the_middle(tmp_path):
    program = (
        "import time, numpy as np\n"
        "from perception_jax.interop.tensors import LazyTensor, TensorSpec\n"
        "from perception_jax.interop.writer import write_checkpoint\n"
        "spec = TensorSpec((4,), np.dtype(np.float32))\n"
        "def read():\n    print('writing', flush=True)\n    time.sleep(60)\n"
        f"write_checkpoint({str(tmp_path / 'm')!r}, [LazyTensor('w', spec, read)])\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "m").exists()
    write_checkpoint(tmp_path / "m", lazy())
    assert open_checkpoint(tmp_path / "m")["w"][0] == 1


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", ".."])
def test_extra_files_stay_in_the_folder(tmp_path, name):
    with pytest.raises(CheckpointError, match="plain names"):
        write_checkpoint(tmp_path / "m", lazy(), extras={name: "x"})
    assert os.listdir(tmp_path) == []


def test_a_name_twice(tmp_path):
    for limit in (10**9, 1):
        with pytest.raises(CheckpointError, match="'w'"):
            write_checkpoint(tmp_path / "m", lazy() + lazy(), max_shard_bytes=limit)
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "m").touch()
    with pytest.raises(CheckpointError, match="found a file"):
        write_checkpoint(tmp_path / "m", lazy(), overwrite=True)
    assert (tmp_path / "m").is_file()
