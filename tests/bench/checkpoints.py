"""Times saving, checking and restoring a state of about a gigabyte.

    python -m tests.bench.checkpoints --megabytes 1024

A third each are parameters and their two moments; as many bytes again do not train. Random numbers,
which do not compress; files just written are in the page cache.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
from flax import nnx

from perception_jax.shard.mesh import make_mesh
from perception_jax.train import checkpoint, integrity
from perception_jax.train.config import TrainConfig
from perception_jax.train.state import TrainState, with_shardings
from perception_jax.train.task_step import TaskStep
from tests.tiny_training import TinyTask

WIDTH, LEAVES = 1024, 8


class Large(TinyTask):
    """`rows` rows in each leaf that trains, and as many bytes as their state that do not train."""

    rows: int = 0

    def init(self, key: jax.Array) -> nnx.Module:
        model = super().init(key)
        keys = jax.random.split(key, LEAVES + 1)
        model.large = nnx.Dict(
            {
                f"l{i}": nnx.Param(jax.random.normal(keys[i], (self.rows, WIDTH)))
                for i in range(LEAVES)
            }
        )
        shape = (3 * LEAVES * self.rows, WIDTH)
        model.frozen = nnx.BatchStat(jax.random.normal(keys[LEAVES], shape))
        return model


def size(path: pathlib.Path) -> float:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1024, help="of what trains")
    parser.add_argument("--saves", type=int, default=3)
    flags = parser.parse_args()
    task = Large()
    task.rows = flags.megabytes * 2**20 // (3 * LEAVES * WIDTH * 4)
    mesh = make_mesh()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        built = TaskStep.of(task, TrainConfig.from_mapping({"steps": 9, "batch_size": 8}), mesh)
        state = built.init()
        moments = jax.tree.map(
            lambda x: jax.random.normal(jax.random.key(2), x.shape)
            if x.dtype == jnp.float32
            else x,
            state.opt_state,
        )
        state = jax.block_until_ready(TrainState(**{**vars(state), "opt_state": moments}))
        iterator = iter(task.datasets()["train"])
        root = pathlib.Path(folder) / "checkpoints"
        with checkpoint.Checkpoints(root, keep=9) as checkpoints:
            for step in range(1, flags.saves + 1):
                start = time.perf_counter()
                checkpoints.save(step, state, iterator.get_state(), {})
                returned = time.perf_counter() - start
                checkpoints.wait()
                whole = time.perf_counter() - start
                print(
                    f"save {step}: returns after {returned:.2f} s, done after {whole:.2f} s, "
                    f"{size(root / str(step)):.0f} MiB",
                    flush=True,
                )
            del state
            for path in (root / str(flags.saves), *(root.parent / "frozen").glob("*")):
                start = time.perf_counter()
                assert not integrity.find_damage(path)
                seconds = time.perf_counter() - start
                print(f"checksums of {path.parent.name}: {seconds:.2f} s for {size(path):.0f} MiB")
            start = time.perf_counter()
            target = with_shardings(built.state, built.shardings)
            jax.block_until_ready(checkpoints.restore(target, iterator).state)
            print(f"restore, checked: {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
