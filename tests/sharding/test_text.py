"""Training a language model gives the same curve on one and on eight devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from perception_jax.nn.lora import LoraConfig
from perception_jax.systems.text.perplexity import Perplexity
from perception_jax.testing import tiny_llama
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from tests.tiny_text import corpus, data, task

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
