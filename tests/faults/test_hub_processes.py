"""Two real processes that load the same checkpoint of the hub download it once per cache."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests.fake_hub import ID

FILES = ("config.json", "model.safetensors")


@pytest.fixture
def remote(tmp_path: pathlib.Path) -> pathlib.Path:
    """The hub, with a checkpoint in two files."""
    folder = tmp_path / "remote"
    (folder / "files").mkdir(parents=True)
    for name in FILES:
        (folder / "files" / name).write_text(name)
    return folder


def fetch(root: pathlib.Path, remote: pathlib.Path, caches: list[pathlib.Path], name: str = ID):
    """Return codes, outputs and errors of two processes, each with its cache."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.fake_hub", port, str(index), remote, cache, name],
            cwd=root,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, cache in enumerate(caches)
    ]
    try:
        said = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *texts) for child, texts in zip(children, said, strict=True)]


def downloads(remote: pathlib.Path) -> list[str]:
    """Each with the process that made it."""
    return (remote / "log").read_text().splitlines()


def test_a_shared_cache_is_filled_by_one_process(root, remote, tmp_path):
    done = fetch(root, remote, [tmp_path / "cache"] * 2)
    folder = tmp_path / "cache" / "snapshots" / "revision-0"
    assert [(code, out) for code, out, _ in done] == [(0, f"{folder}\n")] * 2, done
    assert downloads(remote) == [f"0 {name}" for name in FILES]


def test_caches_that_are_not_shared_get_the_same_revision(root, remote, tmp_path):
    done = fetch(root, remote, [tmp_path / "a", tmp_path / "b"])
    for (code, out, errors), cache in zip(done, ("a", "b"), strict=True):
        assert code == 0, errors
        assert out == f"{tmp_path / cache / 'snapshots' / 'revision-0'}\n"
    assert downloads(remote) == [f"{index} {name}" for index in (0, 1) for name in FILES]


def test_a_download_that_fails_is_named_by_both(root, remote, tmp_path):
    done = fetch(root, remote, [tmp_path / "cache"] * 2, "owner/other")
    assert all(code != 0 for code, _, _ in done)
    assert "CheckpointError: cannot fetch 'owner/other' from the hub: 404" in done[0][2]
    assert "process 0 of this run failed (download of owner/other" in done[1][2]
