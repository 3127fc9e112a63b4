"""A state that moves between meshes and processes keeps its bits, and none reads all of it."""

from __future__ import annotations

import json
import pathlib
import socket
from typing import Any

import chex
import jax
import numpy as np
import pytest

from perception_jax.shard.mesh import make_mesh
from perception_jax.train import frozen
from tests.forking import Server
from tests.sharding import restoring

WHOLE = 4 * restoring.ROWS * restoring.COLUMNS
MATRICES = 5
"""Trained, frozen, average, two moments."""


def test_8_to_1_to_4_devices(tmp_path: pathlib.Path):
    devices = jax.devices()
    mesh = make_mesh(devices=devices)
    with jax.set_mesh(mesh):
        first = restoring.begin(tmp_path, mesh)
    for step, count in ((2, 1), (3, 4)):
        mesh = make_mesh(devices=devices[:count])
        with jax.set_mesh(mesh):
            state = restoring.move(tmp_path, mesh, step)
        assert len(state.trainable["trained"].addressable_shards) == count
        assert state.trainable["trained"].addressable_shards[0].data.shape[0] == 1024 // count
        chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(first))


def restore(server: Server, workdir: pathlib.Path, processes: int) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    logs = [workdir / f"log{index}" for index in range(processes)]
    asked = {"workdir": str(workdir), "processes": processes, "port": port}
    codes = server.start(
        *({**asked, "index": index, "log": str(log)} for index, log in enumerate(logs))
    )
    said = [log.read_text() for log in logs]
    assert codes == [0] * processes, said
    return [json.loads(text.splitlines()[-1]) for text in said]


def test_1_to_2_to_2_to_1_processes_and_what_each_reads(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """Each of two processes reads one half of the arrays, and sums the files of one writer."""
    monkeypatch.setattr(frozen, "CHUNK_BYTES", 2**16)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        first = restoring.digest(restoring.begin(tmp_path, mesh))
    shares = {}
    with Server(root, "tests.sharding.restoring") as server:
        turns = [restore(server, tmp_path, processes) for processes in (2, 2, 1)]
    for turn, found in enumerate(turns):
        processes = len(found)
        assert [each["digest"] for each in found] == [first] * processes
        reads = np.array([each["read"] for each in found]) / (MATRICES * WHOLE)
        assert (np.abs(reads * processes - 1) < 0.15).all(), reads
        shares[turn] = np.array([each["verified"] for each in found]) / (MATRICES * WHOLE)
        assert abs(shares[turn].sum() - 1) < 0.15, shares  # once, by all processes together
    # Each process sums what one process has written; the frozen matrix was written by one.
    assert (np.abs(shares[1] - np.array([3, 2]) / MATRICES) < 0.1).all(), shares
