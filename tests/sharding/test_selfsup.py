"""Self-supervised training on a mesh: statistics and negatives are those of the global batch."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from perception_jax.models.params import flatten, unflatten
from perception_jax.shard.mesh import batch_sharding, make_mesh
from perception_jax.shard.program import collectives
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from tests import tiny_selfsup
from tests.arrays import drawn


@pytest.mark.parametrize(
    ("loss", "seen"),
    [
        ({"name": "vicreg"}, ("covariance", "patch_covariance")),
        (
            {"name": "nt_xent", "transform": tiny_selfsup.MIRRORED, "patches": 4},
            ("contrast", "patch_contrast"),
        ),
    ],
    ids=["vicreg", "nt_xent"],
)
def test_same_curve_on_one_and_eight_devices(tmp_path, loss, seen):
    curves = []
    for name, mesh, devices in (("one", {}, 1), ("eight", {"replica": 2, "tensor": 2}, 8)):
        config = TrainConfig.from_mapping(
            {"steps": 6, "batch_size": 16, "log_every": 1, "checkpoint_every": 0, "mesh": mesh}
        )
        loop.run(
            tiny_selfsup.task(**loss), config, tmp_path / name, devices=jax.devices()[:devices]
        )
        rows = [row for row in read_metrics(tmp_path / name) if "loss" in row]
        curves.append([row["loss"] for row in rows])
        curves[-1] += [rows[0][name] for name in seen]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    assert curves[0][0] - curves[0][5] > 0.01


@pytest.mark.parametrize("transform", [tiny_selfsup.TRANSFORM, tiny_selfsup.MIRRORED])
def test_chips_exchange_statistics_and_never_rows(transform):
    rows = 40  # no width is a multiple of it
    task, mesh = tiny_selfsup.task(rows, transform), make_mesh(2, 4)
    model = drawn(lambda: task.init(jax.random.key(0)))
    batch = next(iter(task.datasets()["train"]))
    (shapes,) = task.batch_shapes()
    batch = {key: jax.device_put(batch[key], batch_sharding(mesh)) for key in shapes}

    def loss(params, batch):
        return task.loss(unflatten(model, params), batch, jax.random.key(0))[0]

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(flatten(model), batch).compile()
    found = collectives(compiled)
    assert found
    assert not [one for one in found if any(side % rows == 0 for side in one.shape)]
