"""The trace of a few training steps is written, and holds these steps."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import pytest

from perception_jax.errors import ConfigError
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from tests.tiny_training import TinyTask


def train(workdir: pathlib.Path, **settings: Any) -> loop.TrainResult:
    defaults = {"steps": 8, "batch_size": 16, "log_every": 1, "checkpoint_every": 0}
    config = TrainConfig.from_mapping({**defaults, **settings})
    return loop.run(TinyTask(), config, workdir, devices=jax.devices()[:1])


def traced_steps(workdir: pathlib.Path) -> list[list[int]]:
    """The steps in each trace of a run, oldest first."""
    return [
        sorted(
            dict(event.stats)["step_num"]
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
            if event.name == "train"
        )
        for file in sorted((workdir / "profile").rglob("*.xplane.pb"))
    ]


def test_the_steps_that_were_asked_for_are_traced(tmp_path):
    assert train(tmp_path, profile_at=3, profile_steps=2).finished
    assert traced_steps(tmp_path) == [[3, 4]]


def test_a_resumed_run_may_trace_and_one_that_ends_writes_what_it_has(tmp_path):
    train(tmp_path, steps=4)
    assert not (tmp_path / "profile").exists()
    assert train(tmp_path, steps=6, profile_at=3, profile_steps=10).finished
    assert traced_steps(tmp_path) == [[5, 6]]


@pytest.mark.parametrize("wrong", [{"profile_at": -1}, {"profile_at": 1, "profile_steps": 0}])
def test_steps_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match="profile_"):
        TrainConfig.from_mapping({"steps": 8, "batch_size": 16, **wrong})
