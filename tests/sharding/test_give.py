"""GiVE on a mesh: its losses are those of the global batch, and only what it adds trains."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.inference.batches import current_mesh
from perception_jax.inference.pairs import BatchedPairs
from perception_jax.models.params import flatten, unflatten
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import program, rules
from perception_jax.systems.give.adapter import InstructionFeatures
from perception_jax.systems.give.encode import as_arrays
from perception_jax.systems.give.model import leaves_in_give
from perception_jax.systems.give.task import GiveTask
from perception_jax.testing.tiny_clip import SIZE
from perception_jax.train import loop, state
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from perception_jax.train.optim import make_optimizer
from tests.tiny_give_task import GROUPS, make_task

MESHES = {
    "one": ({}, 1),
    "fsdp": ({"replica": 2, "fsdp": 4}, 8),
    "all": ({"replica": 2, "fsdp": 2, "tensor": 2}, 8),
}
OPTIM = {"learning_rate": 0.01, "weight_decay": 0.05, "schedule": "constant"}
STEPS = 5


def train(
    workdir: pathlib.Path, mesh: str = "one", task: GiveTask | None = None, **more: Any
) -> loop.TrainResult:
    sizes, devices = MESHES[mesh]
    settings = {"batch_size": GROUPS.batch_size, "log_every": 1, "checkpoint_every": 0}
    config = TrainConfig.from_mapping({**settings, "steps": STEPS, "optim": OPTIM, "mesh": sizes})
    task = make_task() if task is None else task
    return loop.run(task, config, workdir, devices=jax.devices()[:devices], **more)


def curve(workdir: pathlib.Path) -> np.ndarray:
    """Total, its three parts and the norm of the gradient, step by step."""
    names = ("loss", "oitc", "oiic", "oid", "grad_norm")
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    return np.array([[line[name] for name in names] for line in lines])


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[loop.TrainResult, np.ndarray]:
    workdir = tmp_path_factory.mktemp("one")
    return train(workdir), curve(workdir)


def test_values_and_gradients_do_not_depend_on_the_mesh():
    """With adapters that do something: fresh ones pass their gradient on to nothing."""
    task = make_task()
    batch = dict(next(iter(task.datasets()["train"])))
    batch.pop("id")
    model = state.abstract_model(task)
    rng = np.random.default_rng(0)
    trainable = {
        path: np.float32(0.2 * rng.normal(size=leaf.shape))
        for path, leaf in model.trainable.items()
    }
    frozen = dict(task.pretrained(model.frozen))

    def loss(trainable, frozen, batch):
        return task.loss(model.merge(trainable, frozen), batch, jax.random.key(0))

    found = {}
    for name, (sizes, devices) in MESHES.items():
        mesh = mesh_lib.make_mesh(**sizes, devices=jax.devices()[:devices])
        placed = rules.shardings({**model.trainable, **model.frozen}, task.shardings, mesh)
        with jax.set_mesh(mesh):
            found[name] = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                {path: jax.device_put(leaf, placed[path]) for path, leaf in trainable.items()},
                {path: jax.device_put(leaf, placed[path]) for path, leaf in frozen.items()},
                jax.device_put(batch, mesh_lib.batch_sharding(mesh)),
            )
    (value, metrics), gradient = jax.device_get(found.pop("one"))
    assert min(np.abs(leaf).max() for leaf in gradient.values()) > 1e-6
    assert min(float(metrics[name]) for name in ("oitc", "oiic", "oid")) > 0
    for (other, its_metrics), its_gradient in jax.device_get(list(found.values())):
        np.testing.assert_allclose(other, value, atol=1e-5, rtol=0)
        for theirs, ours in ((its_metrics, metrics), (its_gradient, gradient)):
            for name in ours:
                np.testing.assert_allclose(
                    theirs[name], ours[name], atol=1e-5, rtol=1e-5, err_msg=name
                )


def test_same_curve_on_one_and_eight_devices(tmp_path, on_one):
    _, expected = on_one
    task = make_task()
    train(tmp_path, "all", task)
    assert expected.shape == (STEPS, 5)
    np.testing.assert_allclose(curve(tmp_path), expected, atol=1e-5, rtol=1e-5)
    assert expected[0, 0] - expected[-1, 0] > 0.01
    # The step gives its state's memory back, not that of the backbone it came from.
    given = flatten(task.backbone.model)
    assert [path for path, leaf in given.items() if leaf.is_deleted()] == []


def test_a_conditioned_pass_of_an_evaluation_splits_its_pairs():
    """Images and instructions are on every device; what the towers compute for a pair is not."""
    task, mesh, rows = make_task(), mesh_lib.make_mesh(2, 2, 2), 88
    leaves = flatten(task.init(jax.random.key(0)))
    placed = jax.device_put(leaves, rules.shardings(leaves, task.shardings, mesh))
    model = unflatten(task.init(jax.random.key(0)), placed)
    texts = as_arrays(task.encoder.instructions(model, ["the red one", "the blue one"], mesh))

    def conditioned(model, images, image, texts, text):
        features = InstructionFeatures(**texts, strength=jnp.float32(1))
        found = task.encoder.conditioned(model, images, image, features, text)
        return found.embedding, found.presence

    pairs = BatchedPairs(conditioned, batch_size=rows)
    split, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    number = jax.ShapeDtypeStruct((rows,), np.int32, sharding=split)
    images = jax.ShapeDtypeStruct((5, SIZE, SIZE, 3), np.uint8, sharding=whole)
    with current_mesh(mesh):
        program_ = pairs._on(mesh).jitted.lower(
            model, images, number, jax.device_put(texts, whole), number
        )
        found = set(program.results(program_.compile()))
    assert any(result.shape[:1] == (rows // 4,) and len(result.shape) == 3 for result in found)
    assert not [result for result in found if len(result.shape) >= 3 and rows in result.shape]


def test_only_what_give_adds_trains(on_one):
    result, _ = on_one
    task = make_task()
    found, given = flatten(result.model), leaves_in_give(task.backbone.model)
    for path, leaf in given.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    model = state.abstract_model(task)
    assert set(model.frozen) == set(given)
    assert set(model.trainable) == set(found) - set(given)
    assert {path.split("/")[0] for path in model.trainable} == {"backbone", "oid_head"}
    assert all("/inserts/" in path for path in model.trainable if path.startswith("backbone"))
    zero = [path for path in model.trainable if "to_out" in path]
    assert len(zero) == 2

    @jax.jit
    def fresh():  # without what is not returned
        leaves = flatten(task.init(jax.random.key(0)))
        return {path: leaves[path] for path in zero}

    for path, leaf in fresh().items():
        assert np.abs(leaf).max() == 0 < np.abs(found[path]).max()
    # Two moments of each leaf that trains, counters, and nothing of the frozen ones.
    config = TrainConfig.from_mapping({"steps": 1, "batch_size": 16, "optim": OPTIM})
    optimizer = make_optimizer(config.optim, 1, model.trainable)
    abstract = state.abstract_state(model, optimizer.transform, ema=False)
    kept = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.ndim]
    assert len(kept) == 2 * sum(leaf.ndim > 0 for leaf in model.trainable.values())
    assert sum(leaf.size for leaf in kept) == 2 * sum(x.size for x in model.trainable.values())


def test_a_run_that_stopped_goes_on_bit_for_bit(tmp_path, on_one):
    """The sampler's place is part of the checkpoint."""
    whole, expected = on_one
    stopped = train(tmp_path, stop=lambda step: step == 2)
    assert (stopped.step, stopped.finished) == (2, False)
    resumed = train(tmp_path)
    assert (resumed.step, resumed.finished) == (STEPS, True)
    np.testing.assert_array_equal(curve(tmp_path), expected)
    ours = flatten(resumed.model)
    for path, leaf in flatten(whole.model).items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)
