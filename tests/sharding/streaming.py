"""A program: one of two processes that start training from a checkpoint on disk.

python -m tests.sharding.streaming CHECKPOINT PORT INDEX; prints one line of JSON: bytes of private
memory before, at the peak of and after the start, and what the leaves take here.
"""

from __future__ import annotations

import json
import pathlib
import sys
import threading
import time

import jax
import numpy as np
import optax

from perception_jax import api
from perception_jax.models.params import flatten
from perception_jax.shard import mesh as mesh_lib
from perception_jax.systems.give.model import GiveConfig
from perception_jax.systems.give.task import GiveTask, GiveTaskConfig
from perception_jax.train import state as state_lib

SAMPLES = 0.002


def private_bytes() -> int:
    """Memory of this process that is not the cache of a file."""
    status = pathlib.Path("/proc/self/status").read_text()
    return next(
        1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")
    )


class Peak(threading.Thread):
    """Samples the private memory within a `with` block.

    Attributes:
      used: the most that it grew, in bytes.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.used, self._stopped, self._before = 0, threading.Event(), private_bytes()

    def __enter__(self) -> Peak:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        while not self._stopped.is_set():
            self.used = max(self.used, private_bytes() - self._before)
            time.sleep(SAMPLES)


def main(checkpoint: str, port: str, index: int) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh = mesh_lib.make_mesh(1, 2, 1)
    config = GiveTaskConfig(model=GiveConfig(layers=(0,)), batch_size=2)
    task = GiveTask(config, api.open_backbone(checkpoint), None)
    with jax.set_mesh(mesh):
        model = state_lib.abstract_model(task)
        transform = optax.sgd(0.1)
        abstract = state_lib.abstract_state(model, transform, ema=False)
        placed = state_lib.state_shardings(abstract, task.shardings, mesh)
        targets = state_lib.with_shardings(
            {**abstract.trainable, **abstract.frozen}, {**placed.trainable, **placed.frozen}
        )
        with Peak() as read:
            given = jax.block_until_ready(task.pretrained(targets))
        own = sum(leaf.addressable_data(0).nbytes for leaf in given.values())
        whole = sum(leaf.nbytes for leaf in given.values())
        del given
        with Peak() as start:
            state = jax.block_until_ready(state_lib.init_state(task, transform, placed, 0))
    leaves = {**state.trainable, **state.frozen}
    print(
        json.dumps(
            {
                "read": read.used,
                "start": start.used,
                "own": own,
                "whole": whole,
                "largest": max(leaf.nbytes for leaf in leaves.values()),
                "digest": _digest(checkpoint, leaves),
            }
        )
    )


def _digest(checkpoint: str, leaves: dict[str, jax.Array]) -> bool:
    """Whether each shard here is the file's."""
    stored = flatten(api.load(checkpoint).model)
    return all(
        np.array_equal(
            leaf.addressable_data(0), np.asarray(stored[path])[leaf.addressable_shards[0].index]
        )
        for name, leaf in leaves.items()
        if (path := name.removeprefix("backbone/").replace("blocks/base/", "blocks/")) in stored
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
