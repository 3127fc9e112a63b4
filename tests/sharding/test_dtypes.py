"""Leaves that do not train in bfloat16: loading, steps, checkpoints, plans, exports."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perception_jax.models.params import flatten
from perception_jax.shard import slices
from perception_jax.systems.give import program
from perception_jax.systems.give.checkpoint import ADAPTERS_FILE
from perception_jax.systems.give.pretrained import GiveEncoder
from perception_jax.train import loop, restore
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from perception_jax.train.plan import make_plan
from tests.tiny_give_task import GROUPS, make_task
from tests.tiny_training import TinyTask

WHITEN = np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)


class Whitened(TinyTask):
    """Starts from a frozen matrix that bfloat16 rounds."""

    def pretrained(self, targets: Any) -> Any:
        self.target = targets["whiten"]
        return {"whiten": WHITEN}


def config(frozen_dtype: str, **settings: Any) -> TrainConfig:
    defaults = {"batch_size": 16, "log_every": 1, "checkpoint_every": 0}
    return TrainConfig.from_mapping(
        {**defaults, "frozen_dtype": frozen_dtype, "optim": {"schedule": "constant"}, **settings}
    )


def losses(workdir: pathlib.Path) -> np.ndarray:
    return np.array([line["loss"] for line in read_metrics(workdir) if "loss" in line])


def test_frozen_leaves_in_bfloat16_from_loading_to_restore(tmp_path: pathlib.Path):
    for name, steps in (("whole", (8,)), ("parts", (4, 8))):
        for end in steps:
            task = Whitened()
            result = loop.run(task, config("bfloat16", steps=end), tmp_path / name)
    loop.run(Whitened(), config("float32", steps=8), tmp_path / "full")
    assert result.model.whiten[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(result.model.whiten[...], WHITEN.astype(jnp.bfloat16))
    assert result.model.image.kernel[...].dtype == jnp.float32
    np.testing.assert_array_equal(losses(tmp_path / "parts"), losses(tmp_path / "whole"))
    apart = np.abs(losses(tmp_path / "whole") - losses(tmp_path / "full"))
    assert 0 < apart.max() < 0.02
    fresh = Whitened()
    loop.run(fresh, config("bfloat16", steps=1), tmp_path / "fresh")
    assert fresh.target.dtype == jnp.bfloat16
    loaded, _ = restore.load_model(TinyTask(), tmp_path / "parts")
    assert loaded.whiten[...].dtype == jnp.float32  # as the model has it
    np.testing.assert_array_equal(loaded.whiten[...], WHITEN.astype(jnp.bfloat16))


def test_adapters_of_a_bfloat16_backbone_are_those_of_the_backbone(tmp_path: pathlib.Path):
    task, settings = make_task(), {"steps": 3, "batch_size": GROUPS.batch_size}
    result = loop.run(task, config("bfloat16", **settings), tmp_path)
    kept = {leaf.dtype for path, leaf in flatten(result.model).items() if "insert" not in path}
    assert jnp.dtype("bfloat16") in kept
    program.save(result.model, task.backbone, tmp_path)
    for source in (tmp_path / ADAPTERS_FILE, tmp_path / "hf"):
        found = flatten(GiveEncoder.from_pretrained(source, backbone=tmp_path / "hf").model)
        for path, leaf in flatten(result.model).items():
            np.testing.assert_allclose(found[path], leaf, rtol=2**-8, err_msg=path)


def test_a_plan_counts_the_bytes_of_frozen_leaves():
    task, devices = make_task(), jax.devices()[:1]
    found = dataclasses.replace(slices.find("v5e-1"), hbm=2**34)
    full, half = (
        make_plan(
            task,
            config(dtype, steps=1, batch_size=GROUPS.batch_size),
            *task.batch_shapes(),
            found,
            devices,
        )
        for dtype in ("float32", "bfloat16")
    )
    assert full.state_bytes - half.state_bytes == 2 * full.frozen
