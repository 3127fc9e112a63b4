"""Self-supervised training on a mesh: statistics are those of the global batch."""

from __future__ import annotations

import jax
import numpy as np

from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from tests import tiny_selfsup


def test_same_curve_on_one_and_eight_devices(tmp_path):
    curves = []
    for name, mesh, devices in (("one", {}, 1), ("eight", {"replica": 2, "tensor": 2}, 8)):
        config = TrainConfig.from_mapping(
            {"steps": 6, "batch_size": 16, "log_every": 1, "checkpoint_every": 0, "mesh": mesh}
        )
        loop.run(tiny_selfsup.task(), config, tmp_path / name, devices=jax.devices()[:devices])
        rows = [row for row in read_metrics(tmp_path / name) if "loss" in row]
        curves.append([[row[key] for key in ("loss", "patch_covariance")] for row in rows])
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-5)
    assert curves[0][0][0] - curves[0][-1][0] > 0.01
