"""What GiVE costs: sizes of its training step, what adapters add, what sharing saves.

python tests/bench/give.py --sizes [--configs=clip_b16,clip_l14]      by shape alone, no weights
python tests/bench/give.py --speed [--backbone=openai/clip-vit-large-patch14-336] [--batch=8]

`--sizes` compiles each config's own training step for one device at its true size and prints what
XLA says of it. `--speed` measures random weights: images/s of the plain tower and of the same with
twelve adapters, turn by turn; then training steps/s with and without sharing what comes before the
first adapter between the two instructions of a row, for adapters spread over all blocks and in the
last half.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from perception_jax.api import Loaded, published_backbone
from perception_jax.models.paired import build_backbone
from perception_jax.shard.mesh import make_mesh
from perception_jax.systems.give import program
from perception_jax.systems.give.adapter import InstructionFeatures
from perception_jax.systems.give.model import Give, GiveConfig
from perception_jax.systems.give.task import GiveTask, GiveTaskConfig
from perception_jax.train.config import TrainConfig
from perception_jax.train.task_step import TaskStep

CONFIGS = ("clip_b16", "clip_l14", "clip_l14_336", "siglip_so400m")
INSTRUCTION = 16
"""Tokens of the longest instruction; class names are short."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--backbone", default="openai/clip-vit-large-patch14-336")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="rows of a training step")
    parser.add_argument("--calls", type=int, default=5)
    given = parser.parse_args()
    if given.sizes:
        for name in given.configs.split(","):
            print(sizes(name), flush=True)
    if given.speed:
        backbone = published_backbone(given.backbone)
        print(forward_speed(backbone, given.batch, given.calls), flush=True)
        for layers in ("spread", "last half"):
            print(training_speed(backbone, given.rows, given.calls, layers), flush=True)


def sizes(name: str) -> str:
    """One line about a config's training step."""
    config = importlib.import_module(f"configs.give.{name}").get_config()
    backbone = published_backbone(config.backbone).at_size(config.data.size)
    task = GiveTask(program.task_config(config), backbone, data=None)
    train = TrainConfig.from_mapping(config.train.to_dict())
    mesh = make_mesh(replica=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    step = TaskStep.of(task, train, mesh)
    state = step.state
    batch = abstract_batch(backbone, config.train.batch_size, config.data.size)
    start = time.perf_counter()
    compiled = step.trace(batch).compile()
    took = time.perf_counter() - start
    found = compiled.call.memory_analysis()
    rows = config.train.batch_size
    return (
        f"{name:14} {rows} rows  trains {nbytes(state.trainable):8.3f} GiB  frozen "
        f"{nbytes(state.frozen):6.3f} GiB  optimizer {nbytes(state.opt_state):6.3f} GiB  "
        f"activations {found.temp_size_in_bytes / rows / 2**20:7.2f} MiB a row  "
        f"{compiled.model_flops / rows / 1e9:8.1f} GFLOP a row  compiled in {took:.0f} s"
    )


def nbytes(tree: Any) -> float:
    """GiB."""
    leaves = (x for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**30


def joint_width(backbone: Loaded) -> int:
    return backbone.model.text.projection.kernel.shape[1]


def abstract_batch(backbone: Loaded, rows: int, size: int) -> Mapping[str, Any]:
    """Shapes of a batch."""
    text = backbone.config.text

    def told() -> dict[str, jax.ShapeDtypeStruct]:
        return {
            "states": jax.ShapeDtypeStruct((rows, INSTRUCTION, text.width), jnp.float32),
            "mask": jax.ShapeDtypeStruct((rows, INSTRUCTION), bool),
            "embedding": jax.ShapeDtypeStruct((rows, joint_width(backbone)), jnp.float32),
        }

    number = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return {
        "image": jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8),
        **dict.fromkeys(("image_index", "label", "caption_index"), number),
        "ids": jax.ShapeDtypeStruct((rows, text.context), jnp.int32),
        "instruction": told(),
        "absent_instruction": told(),
    }


def forward_speed(backbone: Loaded, batch: int, calls: int) -> str:
    """Images per second of the plain and of the steered tower."""
    give = random_give(backbone, settings_of().model)
    size = backbone.processor.image.size
    pixels = jnp.asarray(np.random.default_rng(0).normal(size=(batch, size, size, 3)), jnp.float32)
    told = random_instruction(backbone, batch)
    plain = jax.jit(lambda give, pixels: give(pixels).embedding)
    steered = jax.jit(lambda give, pixels, told: give(pixels, told).embedding)
    first, second = in_turns(
        (lambda: plain(give, pixels), lambda: steered(give, pixels, told)), calls
    )
    return (
        f"forward   batch {batch}: plain {batch / first:.2f} images/s, with 12 adapters "
        f"{batch / second:.2f} ({first / second:.3f} of it)"
    )


def training_speed(backbone: Loaded, rows: int, calls: int, layers: str) -> str:
    """Gradients per second with and without sharing between the rows of an image."""
    settings = settings_of(layers)
    settings = dataclasses.replace(settings, batch_size=rows, remat="none")
    give = random_give(backbone, settings.model)
    batch = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype),
        abstract_batch(backbone, rows, backbone.processor.image.size),
    )

    def gradient(share: bool) -> Callable[[], Any]:
        task = GiveTask(dataclasses.replace(settings, share=share), backbone, data=None)
        graph, trains, frozen = nnx.split(give, task.trainable, ...)

        def loss(trains: Any, frozen: Any, batch: Any) -> jax.Array:
            return task.loss(nnx.merge(graph, trains, frozen), batch, jax.random.key(0))[0]

        call = jax.jit(jax.grad(loss))
        return lambda: call(trains, frozen, batch)

    shared, naive = in_turns((gradient(True), gradient(False)), calls)
    return (
        f"training  {rows} rows, adapters {layers}: shared {1 / shared:.3f} steps/s, "
        f"naive {1 / naive:.3f} ({naive / shared:.3f}x)"
    )


def settings_of(layers: str = "spread") -> GiveTaskConfig:
    """A task's settings with that choice of blocks."""
    config = importlib.import_module("configs.give.clip_b16").get_config()
    config.adapter.layers = layers
    return program.task_config(config)


def random_give(backbone: Loaded, config: GiveConfig) -> Give:
    """Random weights of the backbone's shapes."""
    return jax.jit(
        lambda: Give(
            config,
            build_backbone(backbone.config, rngs=nnx.Rngs(params=0)),
            rngs=nnx.Rngs(params=1),
        )
    )()


def random_instruction(backbone: Loaded, rows: int) -> InstructionFeatures:
    rng = np.random.default_rng(1)
    shape = (rows, INSTRUCTION, backbone.config.text.width)
    return InstructionFeatures(
        states=jnp.asarray(rng.normal(size=shape), jnp.float32),
        mask=jnp.ones(shape[:2], bool),
        embedding=jnp.zeros((rows, joint_width(backbone))),
        strength=jnp.float32(1.0),
    )


def in_turns(calls: tuple[Callable[[], Any], ...], times: int) -> list[float]:
    """Median seconds of each, taking turns. A turn's first call does not count: it pays for memory
    that the other program has given back."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(times):
        for call, seconds in zip(calls, found, strict=True):
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in found]


if __name__ == "__main__":
    main()
