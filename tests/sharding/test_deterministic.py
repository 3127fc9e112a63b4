"""Training with the same bits on any number of devices."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.errors import ConfigError
from perception_jax.shard import mesh as mesh_lib
from perception_jax.testing import tiny_clip
from perception_jax.train.config import TrainConfig
from perception_jax.train.task_step import TaskStep
from tests import tiny_give_task
from tests.sharding.test_accumulate import PairTask, PatchTask, TokenTask, made_batch

ROWS, UPDATES = 32, 3


def pairs(update: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(update)
    side = tiny_clip.SIZE
    return {
        "image": rng.integers(0, 256, (ROWS, side, side, 3), np.uint8),
        "ids": rng.integers(1, 1000, (ROWS, tiny_clip.CONTEXT)).astype(np.int32),
    }


@functools.cache
def objects() -> list[dict[str, Any]]:
    """The first batches of a small GiVE."""
    batches = itertools.islice(iter(tiny_give_task.make_task().datasets()["train"]), UPDATES)
    return [{key: x for key, x in batch.items() if key != "id"} for batch in batches]


class Noisy(PatchTask):
    """Draws noise from the key."""

    def loss(self, model: Any, batch: Any, key: jax.Array) -> Any:
        noise = jax.random.normal(key, batch["target"].shape)
        return super().loss(model, {**batch, "target": batch["target"] + noise}, key)


CASES = {
    "rows": (PatchTask, made_batch),
    "noise": (Noisy, made_batch),
    "tokens": (TokenTask, made_batch),
    "softmax": (functools.partial(tiny_clip.task, batch_size=ROWS), pairs),
    "sigmoid": (functools.partial(tiny_clip.task, "sigmoid", batch_size=ROWS), pairs),
    "give": (tiny_give_task.make_task, lambda update: objects()[update]),
    "neither": (PairTask, made_batch),
}
USUAL = {"noise": (4,), "give": (2,)}
"""Numbers of devices that are compared with one in the usual tests."""
ALL = {case: (2, 4, 8) for case in CASES if case != "neither"}


def train(case: str, devices: int, **settings: Any) -> tuple[Any, list[dict[str, float]]]:
    """The state after some updates on the host, and the metrics of each."""
    make_task, batch_of = CASES[case]
    rows = len(jax.tree.leaves(batch_of(0))[0])
    given = {"steps": UPDATES, "batch_size": rows, "optim": {"ema": 0.9}, **settings}
    config = TrainConfig.from_mapping(given)
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        step = TaskStep.of(make_task(), config, mesh)
        batch = batch_of(0)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        call = step.compile(shapes).call
        state, history = step.init(), []
        for update in range(UPDATES):
            batch = jax.device_put(batch_of(update), mesh_lib.batch_sharding(mesh))
            state, metrics = call(state, batch)
            history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), history


@pytest.mark.parametrize(
    ("case", "counts"),
    [*USUAL.items(), *(pytest.param(*row, marks=pytest.mark.slow) for row in ALL.items())],
)
def test_the_same_bits_on_any_number_of_devices(case, counts):
    state, history = train(case, 1, deterministic=True)
    for devices in counts:
        other, others = train(case, devices, deterministic=True)
        assert others == history, devices
        for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(state), strict=True):
            assert ours.tobytes() == theirs.tobytes(), devices
    assert history[0]["loss"] != history[-1]["loss"]


@pytest.mark.parametrize("case", ["tokens", "softmax", "give"])
def test_the_numbers_are_those_of_the_plain_step(case):
    (state, history), (other, others) = (train(case, 1, deterministic=on) for on in (True, False))
    for ours, theirs in zip(history, others, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    for path, leaf in other.trainable.items():
        np.testing.assert_allclose(state.trainable[path], leaf, atol=5e-4, err_msg=path)


def test_the_update_is_compiled_once_for_all_steps_and_shapes():
    config = TrainConfig.from_mapping({"steps": 2, "batch_size": ROWS, "deterministic": True})
    mesh, traced = mesh_lib.make_mesh(devices=jax.devices()[:1]), []
    with jax.set_mesh(mesh):
        plain = TaskStep.of(TokenTask(), config, mesh)

        def apply(*arguments: Any) -> Any:
            traced.append(None)
            return plain.step.apply(*arguments)

        step = dataclasses.replace(plain, step=dataclasses.replace(plain.step, apply=apply))
        state, batch = step.init(), made_batch(0)
        short = {**batch, "ids": batch["ids"][:, :8], "labels": batch["labels"][:, :8]}
        losses = []
        for rows in (batch, short, batch):
            state, metrics = step.compile(rows).call(state, jax.tree.map(jnp.asarray, rows))
            losses.append(float(metrics["loss"]))
    assert len(traced) == 1
    assert np.isfinite(losses).all()
    assert losses[0] != losses[1]


def test_faults():
    with pytest.raises(ConfigError, match="PairTask has neither"):
        train("neither", 1, deterministic=True)
    with pytest.raises(ConfigError, match="Set deterministic_parts to 8"):
        train("rows", 8, deterministic=True, deterministic_parts=4)
    with pytest.raises(ConfigError, match="a divisor of 32"):
        train("rows", 1, deterministic=True, deterministic_parts=12)
    with pytest.raises(ConfigError, match="1 with deterministic"):
        train("rows", 1, deterministic=True, optim={"accumulate": 2})
