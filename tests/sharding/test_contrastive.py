"""CLIP itself on a mesh: its sharding table, its global-batch losses, loading onto devices."""

from __future__ import annotations

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.params import flatten, unflatten
from perception_jax.shard.mesh import batch_sharding, make_mesh
from perception_jax.shard.program import collectives
from perception_jax.testing import tiny_clip
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from tests.arrays import drawn, normal


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_same_curve_on_one_and_eight_devices(tmp_path, loss):
    curves = []
    for name, mesh, devices in (("one", {}, 1), ("eight", {"replica": 2, "tensor": 2}, 8)):
        config = TrainConfig.from_mapping(
            {"steps": 6, "batch_size": 16, "log_every": 1, "checkpoint_every": 0, "mesh": mesh}
        )
        loop.run(tiny_clip.task(loss), config, tmp_path / name, devices=jax.devices()[:devices])
        curves.append([row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row])
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-5, rtol=0)
    assert curves[0][0] - curves[0][-1] > 0.01


def test_a_batch_smaller_than_the_chips_trains_split_over_layers(tmp_path):
    def run(name, mesh, devices):
        config = TrainConfig.from_mapping(
            {"steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 0, "mesh": mesh}
        )
        task = tiny_clip.task(batch_size=4)
        loop.run(task, config, tmp_path / name, devices=jax.devices()[:devices])
        return [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]

    with pytest.raises(ConfigError, match=r"mesh\.replica=1 mesh\.fsdp=4 mesh\.tensor=2"):
        run("refused", {}, 8)
    eight = run("eight", {"fsdp": 4, "tensor": 2}, 8)
    np.testing.assert_allclose(eight, run("one", {}, 1), atol=1e-5, rtol=0)


def test_a_batch_in_parts_is_the_whole_batch():
    task, mesh = tiny_clip.task(), make_mesh(2, 4)
    model = drawn(lambda: Clip(tiny_clip.CONFIG, rngs=nnx.Rngs(params=0)))
    batch = next(iter(task.datasets()["train"]))
    batch = {key: jax.device_put(batch[key], batch_sharding(mesh)) for key in ("image", "ids")}

    def loss(params, batch):
        return task.loss(unflatten(model, params), batch, jax.random.key(0))[0]

    def gradient(parts):
        task.config = dataclasses.replace(task.config, parts=parts)
        with jax.set_mesh(mesh):
            # A function of its own for each number of parts, which no cache knows.
            step = jax.jit(lambda *given: jax.value_and_grad(loss)(*given))
            compiled = step.lower(flatten(model), batch).compile()
            return compiled(flatten(model), batch), compiled

    whole, _ = gradient(1)
    parts, compiled = gradient(2)
    chex.assert_trees_all_close(parts, whole, atol=1e-5)
    # Every part lies where its rows were: pixels are never sent.
    pixels = (tiny_clip.SIZE, tiny_clip.SIZE, 3)
    assert not [found for found in collectives(compiled) if found.shape[-3:] == pixels]
    with pytest.raises(ConfigError, match="that 3 parts on 8 shards of the mesh divide, found 16"):
        gradient(3)


def test_load_onto_a_mesh_gives_the_same_embeddings(tmp_path):
    model = drawn(lambda: Clip(tiny_clip.CONFIG, rngs=nnx.Rngs(params=0)))
    processor = Processor(image=ImageProcessor(size=tiny_clip.SIZE), tokenizer=None)
    loaded = Loaded(model=model, config=tiny_clip.CONFIG, processor=processor)
    perception_jax.export(loaded, tmp_path / "hf")
    mesh = make_mesh(2, 2, 2)
    placed = perception_jax.load(tmp_path / "hf", mesh=mesh)
    kernel = flatten(placed.model)["vision/blocks/attention/q_proj/kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4
    pixels = normal(0, 4, tiny_clip.SIZE, tiny_clip.SIZE, 3)
    ids = np.array([[1022, 5, 1023, 1023], [1022, 1023, 0, 0]])
    run = jax.jit(lambda model, pixels, ids: model(pixels, ids))
    with jax.set_mesh(mesh):
        sharded = run(placed.model, pixels, ids)
    chex.assert_trees_all_close(sharded, run(model, pixels, ids), atol=1e-5)
