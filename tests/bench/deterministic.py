"""What the same bits on any number of devices cost: a config's step with and without, in turns.

python tests/bench/deterministic.py [--config=configs/clip/scenes.py] [--devices=1,2] [--rounds=5]

Random batches of the config's shapes on virtual CPU devices, in the settings of the config but for
`train.deterministic`. Printed are the median seconds of a step, and whether the loss of the last
step has the same bits on all numbers of devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from launch import common, systems
from perception_jax.shard import mesh as mesh_lib
from perception_jax.train.config import TrainConfig
from perception_jax.train.task_step import TaskStep


def drawn(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Random pixels, token ids or numbers."""
    rng = np.random.default_rng(0)
    if np.issubdtype(shape.dtype, np.integer):
        return rng.integers(1, 200, shape.shape).astype(shape.dtype)
    return rng.normal(size=shape.shape).astype(shape.dtype)


def step_of(settings: Any, devices: int, *, deterministic: bool) -> Callable[[], float]:
    """A function that does one step and returns its loss."""
    task, (shapes,) = systems.planning_program(settings).shapes(settings)
    config = TrainConfig.from_mapping(settings.train.to_dict())
    config = dataclasses.replace(config, deterministic=deterministic)
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        step = TaskStep.of(task, config, mesh)
        batch = jax.device_put(jax.tree.map(drawn, shapes), mesh_lib.batch_sharding(mesh))
        compiled, state = step.compile(batch), [step.init()]

    def call() -> float:
        with jax.set_mesh(mesh):
            state[0], metrics = compiled.call(state[0], batch)
            return float(metrics["loss"])

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/clip/scenes.py")
    parser.add_argument(
        "--devices", default=[1, 2], type=lambda text: [int(n) for n in text.split(",")]
    )
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(given.devices))
    settings, _ = common.load_config(given.config)
    losses = set()
    for devices in given.devices:
        steps = {
            name: step_of(settings, devices, deterministic=name == "deterministic")
            for name in ("plain", "deterministic")
        }
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(given.rounds + 1):
            for name, call in steps.items():
                start = time.perf_counter()
                loss = call()
                if turn:
                    taken[name].append(time.perf_counter() - start)
        losses.add(loss)
        plain, exact = (statistics.median(taken[name]) for name in steps)
        print(
            f"{devices} devices: plain {plain:.3f} s a step, deterministic {exact:.3f} s "
            f"({exact / plain:.2f} times)",
            flush=True,
        )
    same = "the same" if len(losses) == 1 else "DIFFERENT"
    print(f"loss after {given.rounds + 1} deterministic steps: {same} bits {sorted(losses)}")


if __name__ == "__main__":
    main()
