"""A program of `test_restoring`: one of several processes that restore a state and save it again.

Each is a fork (`tests.forking`). Prints as JSON: a digest of the whole state, and how many bytes
this process read for it.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import numpy as np
import tensorstore
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from launch import compile_cache
from perception_jax.shard import distributed
from perception_jax.shard.mesh import make_mesh
from perception_jax.train import checkpoint, frozen, integrity, state_tree
from perception_jax.train.config import TrainConfig
from perception_jax.train.state import TrainState, with_shardings
from perception_jax.train.task_step import TaskStep
from tests.forking import Order, serve
from tests.tiny_training import TinyTask

ROWS, COLUMNS = 1024, 512
SETTINGS = {"steps": 9, "batch_size": 16, "optim": {"ema": 0.9}}


class Large(TinyTask):
    """A trained and a frozen matrix of 2 MiB each, of random numbers: they do not compress."""

    shardings: Any = (
        (r"^(trained|frozen)$", PartitionSpec("fsdp")),
        (r".*", PartitionSpec()),
    )

    def init(self, key: jax.Array) -> nnx.Module:
        model = super().init(key)
        model.trained = nnx.Param(jax.random.normal(key, (ROWS, COLUMNS)))
        model.frozen = nnx.BatchStat(jax.random.normal(jax.random.key(1), (ROWS, COLUMNS)))
        return model


def begin(workdir: pathlib.Path, mesh: Mesh) -> TrainState:
    """Saves a new state as step 1, with moments that are not zero."""
    step = _task_step(mesh)
    state = step.init()
    moments = jax.tree.map(
        lambda x: x + jax.random.normal(jax.random.key(2), x.shape) if x.ndim else x,
        state.opt_state,
    )
    state = TrainState(**{**vars(state), "opt_state": moments})
    _save(workdir, 1, state)
    return state


def move(workdir: pathlib.Path, mesh: Mesh, step: int) -> TrainState:
    """Restores the newest state on a mesh and saves it as `step`."""
    built = _task_step(mesh)
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        iterator = iter(built.task.datasets()["train"])
        target = with_shardings(built.state, built.shardings)
        restored = checkpoints.restore(target, iterator)
        assert restored is not None
    _save(workdir, step, restored.state)
    return restored.state


def digest(state: TrainState) -> str:
    """Of all leaves, the same on any mesh."""
    return frozen.digest(state_tree.flatten(state_tree.to_tree(state)))


def bytes_read() -> int:
    """What tensorstore has read from files so far."""
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/")
    found = [m["values"] for m in metrics if m["name"].endswith("/bytes_read")]
    return sum(int(value["value"]) for values in found for value in values)


def _task_step(mesh: Mesh) -> TaskStep:
    return TaskStep.of(Large(), TrainConfig.from_mapping(SETTINGS), mesh)


def _save(workdir: pathlib.Path, step: int, state: TrainState) -> None:
    iterator = iter(Large().datasets()["train"])
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        checkpoints.save(step, state, iterator.get_state(), {})


def run(order: Order) -> int:
    workdir, processes = pathlib.Path(order["workdir"]), order["processes"]
    compile_cache.skip_several_cpu_devices()
    jax.config.update("jax_num_cpu_devices", 2)
    distributed.initialize(
        processes > 1,
        coordinator_address=f"localhost:{order['port']}",
        num_processes=processes,
        process_id=order["index"],
    )
    frozen.CHUNK_BYTES = 2**16
    summed: list[int] = []  # by several threads
    real = integrity._checksum

    def counted(path: pathlib.Path, start: int, length: int) -> int:
        summed.append(min(length, path.stat().st_size - start))
        return real(path, start, length)

    integrity._checksum = counted
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        built = _task_step(mesh)
        with checkpoint.Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
            iterator = iter(built.task.datasets()["train"])
            restored = checkpoints.restore(with_shardings(built.state, built.shardings), iterator)
            assert restored is not None
            read, verified = bytes_read(), sum(summed)
        _save(workdir, restored.step + 1, restored.state)
        found = digest(restored.state)
    largest = restored.state.trainable["trained"].addressable_shards
    own = {tuple(np.asarray(shard.data).shape) for shard in largest}
    print(json.dumps({"digest": found, "read": read, "verified": verified, "own": list(own)}))
    if processes > 1:
        jax.distributed.shutdown()  # waits for the others
    return 0


if __name__ == "__main__":
    serve(run)
