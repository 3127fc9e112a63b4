"""Training a language model gives the same curve on one and on eight devices."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from perception_jax.api import Loaded, Processor
from perception_jax.models.llama.modeling import Llama
from perception_jax.nn.lora import LoraConfig
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import traffic
from perception_jax.systems.text.perplexity import Perplexity
from perception_jax.systems.text.task import TextTask, TextTaskConfig
from perception_jax.testing import tiny_llama
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from perception_jax.train.task_step import TaskStep
from tests.tiny_text import corpus, data, task

CHUNK, LENGTH = 4, 32
"""Tokens of a row whose logits are computed at a time, and of a row."""
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.1)


@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "lora"])
def test_same_curve_on_one_and_eight_devices(tmp_path, lora):
    curves, scores = [], []
    for name, mesh, devices in (("one", {}, 1), ("eight", {"replica": 2, "tensor": 2}, 8)):
        config = TrainConfig.from_mapping(
            {
                "steps": 5,
                "batch_size": 8,
                "log_every": 1,
                "checkpoint_every": 0,
                "mesh": mesh,
                "optim": {"learning_rate": 1e-2, "weight_decay": 0.0},
            }
        )
        source = corpus(40)
        base = None if lora is None else tiny_llama.loaded()
        trained = task(base, source, batch_size=8, lora=lora)
        result = loop.run(trained, config, tmp_path / name, devices=jax.devices()[:devices])
        rows = [row for row in read_metrics(tmp_path / name) if "loss" in row]
        curves.append([(row["loss"], row["accuracy"], row["tokens"]) for row in rows])
        held_out = Perplexity(data(corpus(7, seed=5)), batch_size=3, dtype="float32")
        scores.append(held_out(result.model)["loss"])
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5, rtol=0)
    assert curves[0][0][0] - curves[0][-1][0] > 0.01


@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "lora"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_gathered_once_and_not_for_each_chunk(tied, lora):
    config = dataclasses.replace(tiny_llama.CONFIG, tied=tied, vocab_size=112)
    base = Loaded(
        model=nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(params=0))),
        config=config,
        processor=Processor(image=None, tokenizer=None),
    )
    settings = TextTaskConfig(batch_size=8, length=LENGTH, lora=lora, chunk=CHUNK)
    trained = TextTask(settings, base, None)
    train = TrainConfig.from_mapping({"steps": 1, "batch_size": 8, "mesh": {"fsdp": 4}})
    mesh = mesh_lib.make_mesh(1, 4, 1, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        step = TaskStep.of(trained, train, mesh)
        compiled = step.compile(*trained.batch_shapes()).call
    head = sorted((config.vocab_size, config.width))
    gathers = [
        found.times
        for found in traffic.traffic(compiled, mesh.size)
        if found.kind == "all-gather" and sorted(found.result.shape) == head
    ]
    # Once for the table and once for the head, and perhaps again in the backward pass.
    assert 1 <= sum(gathers) <= 4 < LENGTH // CHUNK
