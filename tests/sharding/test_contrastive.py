"""CLIP itself on a mesh: its sharding table, its global-batch losses, loading onto devices."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.params import flatten
from perception_jax.shard.mesh import make_mesh
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
