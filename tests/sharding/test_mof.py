"""Training a LLaVA with two towers gives the same curve on one and on eight devices."""

from __future__ import annotations

import jax
import numpy as np

from perception_jax.data.grouping import Division
from perception_jax.inference.held_out import HeldOutLoss
from perception_jax.systems.mof.task import chat_predictions
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from tests.tiny_chats import Chats
from tests.tiny_mof import chats, task


def test_same_curve_on_one_and_eight_devices(tmp_path):
    """The rows of a device of the recipe are on several of the run's; micro-batches hold them."""
    curves, scores = [], []
    trained = task(trains="all", order="random", division=Division(rows=8, devices=2))
    for name, mesh, devices in (("one", {}, 1), ("eight", {"replica": 2, "tensor": 2}, 8)):
        config = TrainConfig.from_mapping(
            {
                "steps": 3,
                "batch_size": 16,
                "log_every": 1,
                "checkpoint_every": 0,
                "mesh": mesh,
                "optim": {"learning_rate": 1e-3, "weight_decay": 0.0, "accumulate": 2},
            }
        )
        result = loop.run(trained, config, tmp_path / name, devices=jax.devices()[:devices])
        rows = [row for row in read_metrics(tmp_path / name) if "loss" in row]
        curves.append([(row["loss"], row["accuracy"], row["tokens"]) for row in rows])
        predictions = chat_predictions(batch_size=3, dtype="float32", chunk=32)
        held_out = HeldOutLoss(predictions, chats(trained.base, Chats.made(7)))
        scores.append(held_out(result.model)["loss"])
    np.testing.assert_allclose(curves[1], curves[0], atol=1e-5, rtol=0)
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5, rtol=0)
    assert curves[0][0][0] != curves[0][-1][0]
