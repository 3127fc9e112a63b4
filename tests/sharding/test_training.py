"""The same run on one device and on eight: loss curves, placement, restore on another mesh."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import signal
import socket
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.models.params import flatten
from perception_jax.shard.mesh import make_mesh
from perception_jax.train import loop, restore, state
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from perception_jax.train.optim import make_optimizer
from perception_jax.train.step import make_step
from tests.tiny_training import Frozen, TinyTask, program, wait_for_step

MESHES = {
    "one": ({}, 1),
    "fsdp": ({"fsdp": 8}, 8),
    "all": ({"replica": 2, "fsdp": 2, "tensor": 2}, 8),
    "replicas": ({"replica": 2, "fsdp": 4}, 8),
}
OPTIM = {"learning_rate": 0.02, "weight_decay": 0.1}


def train(
    workdir: pathlib.Path, mesh: str = "one", task: TinyTask | None = None, **settings: Any
) -> loop.TrainResult:
    sizes, devices = MESHES[mesh]
    defaults = {"steps": 20, "batch_size": 16, "log_every": 1, "checkpoint_every": 0}
    config = TrainConfig.from_mapping({**defaults, "optim": OPTIM, "mesh": sizes, **settings})
    return loop.run(task or TinyTask(), config, workdir, devices=jax.devices()[:devices])


def losses(workdir: pathlib.Path) -> np.ndarray:
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines])


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_one_device_and_eight_give_the_same_curve(tmp_path: pathlib.Path, loss: str):
    curves = {}
    for mesh in ("one", "fsdp", "all"):
        task = TinyTask(loss_name=loss)
        result = train(tmp_path / mesh, mesh, task)
        curves[mesh] = losses(tmp_path / mesh)
        # Once for the step, once to count its FLOPs: nothing recompiles in steady state.
        assert task.traces == 2
        assert len(result.model.image.kernel[...].addressable_shards) == MESHES[mesh][1]
    assert curves["one"][0] - curves["one"][-1] > 0.1  # it does learn
    np.testing.assert_allclose(curves["fsdp"], curves["one"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(curves["all"], curves["one"], atol=1e-5, rtol=0)


def test_accumulation_gives_the_same_curve_on_every_mesh(tmp_path: pathlib.Path):
    optim = {**OPTIM, "accumulate": 2}
    for mesh in ("one", "all"):
        task = TinyTask()
        train(tmp_path / mesh, mesh, task, steps=6, optim=optim)
        assert task.traces == 2
    train(tmp_path / "whole", steps=6)
    np.testing.assert_allclose(losses(tmp_path / "all"), losses(tmp_path / "one"), atol=1e-5)
    # Fewer negatives: a contrastive loss is that of a micro-batch.
    assert losses(tmp_path / "one")[0] < losses(tmp_path / "whole")[0] - 0.3


def test_a_run_continues_on_another_mesh(tmp_path: pathlib.Path):
    train(tmp_path / "whole", "one", steps=12, optim={**OPTIM, "schedule": "constant"})
    for steps, mesh in ((4, "fsdp"), (8, "one"), (12, "replicas")):
        constant = {**OPTIM, "schedule": "constant"}
        result = train(tmp_path / "parts", mesh, steps=steps, optim=constant)
        assert (result.step, result.finished) == (steps, True)
    np.testing.assert_allclose(
        losses(tmp_path / "parts"), losses(tmp_path / "whole"), atol=1e-5, rtol=0
    )


def test_two_processes_are_one_run_and_stop_together(root: pathlib.Path, tmp_path: pathlib.Path):
    settings = {"steps": 12, "noise": 0.0, "checkpoint_every": 0}

    @contextlib.contextmanager
    def both(**more: Any) -> Iterator[list[Any]]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        with contextlib.ExitStack() as stack:
            shared = {**settings, "processes": 2, "port": port, **more}
            yield [
                stack.enter_context(program(root, tmp_path / "two", process=index, **shared))
                for index in range(2)
            ]

    def ends(children: list[Any]) -> list[str]:
        said = [child.communicate(timeout=120) for child in children]
        assert [child.returncode for child in children] == [0, 0], said
        return [out.splitlines()[-1] for out, _ in said]

    with both(pause=0.25) as children:
        wait_for_step(children[1], 3)
        children[1].send_signal(signal.SIGTERM)  # to one only
        first, second = ends(children)
        assert first == second
        assert first.startswith("stopped")
    with both() as children:
        assert ends(children) == ["finished 12", "finished 12"]
    train(tmp_path / "one", task=TinyTask(noise=0.0), steps=12, optim={})
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5)


def test_state_is_born_where_the_rules_say():
    task, mesh = TinyTask(), make_mesh(replica=2, tensor=2)
    model = state.abstract_model(task)
    config = TrainConfig.from_mapping({"steps": 2, "batch_size": 16})
    optimizer = make_optimizer(config.optim, 1, model.trainable)
    abstract = state.abstract_state(model, optimizer.transform, ema=True)
    shardings = state.state_shardings(abstract, task.shardings, mesh)
    born = state.init_state(task, optimizer.transform, shardings, seed=0)
    split = PartitionSpec(None, ("fsdp", "tensor"))
    found = [
        (jax.tree_util.keystr(keys, simple=True, separator="/"), leaf)
        for keys, leaf in jax.tree.leaves_with_path(born)
        if leaf.shape == (12, 16)
    ]
    assert len(found) == 4  # trainable, ema, mu, nu
    assert {leaf.sharding.spec for _, leaf in found} == {split}
    assert found[0][1].addressable_shards[0].data.shape == (12, 4)
    assert set(born.frozen) == {"whiten"}
    assert not [x for x in jax.tree.leaves(born.opt_state) if x.shape == (12, 12)]
    chex.assert_trees_all_equal_shapes_and_dtypes(born, abstract)


def test_frozen_leaves_do_not_move(tmp_path: pathlib.Path):
    model = train(tmp_path, steps=3).model
    np.testing.assert_array_equal(model.whiten[...], np.eye(12, dtype=np.float32) * 0.5)
    assert type(model.whiten) is Frozen


def test_a_filter_that_selects_nothing_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(ConfigError, match="selects none of the model's 7 leaves"):
        train(tmp_path, task=TinyTask(trainable=nnx.BatchStat))


class Pretrained(TinyTask):
    """Starts from given leaves."""

    given: Any = None

    def pretrained(self, targets: Any) -> Any:
        return self.given(targets)


def test_pretrained_leaves_replace_fresh_ones(tmp_path: pathlib.Path):
    task = Pretrained()
    fresh = train(tmp_path / "fresh", "fsdp", steps=1, optim={"learning_rate": 1e-9}).model
    seen = {}

    def given(targets: Any) -> Any:
        seen.update(targets)
        kernel = targets["image/kernel"]
        return {
            "whiten": np.full((12, 12), 2.0),  # float64 becomes the leaf's float32
            "image/kernel": jax.jit(
                lambda: jnp.full(kernel.shape, 3.0), out_shardings=kernel.sharding
            )(),
        }

    task.given = given
    optim = {"learning_rate": 1e-9, "weight_decay": 0.0, "ema": 0.5}
    model = train(tmp_path / "given", "fsdp", task, steps=1, optim=optim).model
    np.testing.assert_allclose(model.whiten[...], 2.0)
    np.testing.assert_allclose(model.image.kernel[...], 3.0, rtol=1e-6)
    assert model.whiten[...].dtype == jnp.float32
    # The rest is initialised as it is without pretrained leaves.
    np.testing.assert_allclose(model.text.kernel[...], fresh.text.kernel[...], rtol=1e-6)
    assert set(seen) == set(flatten(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in seen.values())
    assert len(seen["image/kernel"].sharding.device_set) == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image/kernel": np.zeros((3, 3))}, r"shape \(12, 16\), the given array \(3, 3\)"),
        ({"image/weight": np.zeros((3, 3))}, "no leaf 'image/weight'"),
    ],
)
def test_pretrained_leaves_that_do_not_fit(tmp_path: pathlib.Path, given: Any, message: str):
    task = Pretrained()
    task.given = lambda targets: given
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, task=task)


def test_bfloat16_compute_keeps_float32_weights(tmp_path: pathlib.Path):
    result = train(tmp_path / "half", compute_dtype="bfloat16")
    train(tmp_path / "full")
    assert result.model.image.kernel[...].dtype == jnp.float32
    np.testing.assert_allclose(losses(tmp_path / "half"), losses(tmp_path / "full"), atol=0.05)
    assert np.abs(losses(tmp_path / "half") - losses(tmp_path / "full")).max() > 1e-5


def test_moving_average_by_hand_and_from_a_checkpoint(tmp_path: pathlib.Path):
    task = TinyTask()
    model = state.abstract_model(task)
    config = TrainConfig.from_mapping(
        {"steps": 4, "batch_size": 16, "optim": {**OPTIM, "ema": 0.75}}
    )
    optimizer = make_optimizer(config.optim, 4, model.trainable)
    abstract = state.abstract_state(model, optimizer.transform, ema=True)
    shardings = state.state_shardings(
        abstract, task.shardings, make_mesh(devices=jax.devices()[:1])
    )
    now = state.init_state(task, optimizer.transform, shardings, seed=0)
    step = jax.jit(make_step(task, model, optimizer, config=config))
    expected = now.trainable["image/kernel"]
    batches = iter(task.datasets()["train"])
    for _ in range(4):
        batch = dict(next(batches))
        del batch["id"]
        now, _ = step(now, batch)
        expected = 0.75 * expected + 0.25 * now.trainable["image/kernel"]
    np.testing.assert_allclose(now.ema["image/kernel"], expected, rtol=1e-6)

    result = train(tmp_path, "fsdp", steps=4, optim={**OPTIM, "ema": 0.75})
    np.testing.assert_allclose(result.model.image.kernel[...], expected, rtol=1e-4, atol=1e-6)
    loaded, loaded_step = restore.load_model(task, tmp_path, mesh=make_mesh(tensor=4))
    assert loaded_step == 4
    chex.assert_trees_all_equal(
        nnx.to_pure_dict(nnx.state(loaded)), nnx.to_pure_dict(nnx.state(result.model))
    )


def test_load_model_names_what_is_there(tmp_path: pathlib.Path):
    train(tmp_path, steps=2)
    assert restore.load_model(TinyTask(), tmp_path / "checkpoints" / "2")[1] == 2
    with pytest.raises(CheckpointError, match=r"expected the checkpoint of step 5 .* found 2"):
        restore.load_model(TinyTask(), tmp_path, step=5)
    with pytest.raises(CheckpointError, match=r"found none\. Give the workdir"):
        restore.load_model(TinyTask(), tmp_path / "nothing")


def test_metrics_say_what_the_step_did():
    task = TinyTask()
    model = state.abstract_model(task)
    config = TrainConfig.from_mapping({"steps": 9, "batch_size": 16, "optim": OPTIM})
    optimizer = make_optimizer(config.optim, 9, model.trainable)
    abstract = state.abstract_state(model, optimizer.transform, ema=False)
    shardings = state.state_shardings(
        abstract, task.shardings, make_mesh(devices=jax.devices()[:1])
    )
    before = state.init_state(task, optimizer.transform, shardings, seed=0)
    step = jax.jit(make_step(task, model, optimizer, config=config))
    batch = dict(next(iter(task.datasets()["train"])))
    del batch["id"]
    after, metrics = step(before, batch)
    moved = optax.tree.norm(jax.tree.map(jnp.subtract, after.trainable, before.trainable))
    norm = optax.tree.norm(after.trainable)
    np.testing.assert_allclose(metrics["param_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(metrics["update_ratio"], moved / norm, rtol=1e-3)
    np.testing.assert_allclose(metrics["learning_rate"], 0.02, rtol=1e-6)
    assert int(after.step) == 1
    # Each step has a key of its own, the same in every run.
    second = dataclasses.replace(before, step=jnp.int32(1))
    noisy = [float(step(start, batch)[1]["loss"]) for start in (before, before, second)]
    assert noisy[0] == noisy[1] != noisy[2]
    assert set(metrics) == {
        "loss",
        "grad_norm",
        "param_norm",
        "update_ratio",
        "learning_rate",
        "valid",
    }


class Wider(TinyTask):
    """Another model: embeddings of 24, and one leaf more."""

    def init(self, key: jax.Array) -> nnx.Module:
        model = super().init(key)
        if self.loss_name == "wide":
            model.image = nnx.Linear(12, 24, rngs=nnx.Rngs(key))
        else:
            model.extra = nnx.Param(jnp.zeros(3))
        return model


@pytest.mark.parametrize(
    ("kind", "leaf", "shape"),
    [
        ("wide", "image/bias", r"\(16,\) in the checkpoint, \(24,\) in the model"),
        ("extra", "extra", r"absent in the checkpoint, \(3,\) in the model"),
    ],
)
def test_another_model_is_not_loaded(tmp_path: pathlib.Path, kind: str, leaf: str, shape: str):
    train(tmp_path, steps=2)
    message = rf"(?s)is of another model or optimizer:.*trainable/{leaf}: {shape}"
    with pytest.raises(CheckpointError, match=message):
        restore.load_model(Wider(loss_name=kind), tmp_path)
    with pytest.raises(CheckpointError, match=rf"{message}.*Use the settings"):
        train(tmp_path, task=Wider(loss_name=kind), steps=4)
    assert restore.load_model(TinyTask(), tmp_path)[1] == 2  # nothing was set aside
