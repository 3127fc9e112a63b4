"""A task with a declared set of batch shapes: each compiled once, before the first step."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from perception_jax.errors import ConfigError, DataError
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import Clock, read_metrics
from tests.tiny_training import Bucketed

KEYS = ("step", "loss", "grad_norm", "param_norm", "tokens")


def train(workdir: pathlib.Path, task: Bucketed, devices: int = 8, **settings: Any) -> Any:
    defaults = {"steps": 8, "batch_size": 16, "log_every": 1, "checkpoint_every": 0}
    config = TrainConfig.from_mapping({**defaults, "optim": {"schedule": "constant"}, **settings})
    return loop.run(task, config, workdir, devices=jax.devices()[:devices])


def curve(workdir: pathlib.Path) -> list[tuple[Any, ...]]:
    return [tuple(line[key] for key in KEYS) for line in read_metrics(workdir) if "loss" in line]


def test_each_shape_is_compiled_once_and_a_resumed_run_is_bit_equal(tmp_path, caplog):
    task = Bucketed()
    caplog.set_level("INFO")
    train(tmp_path / "whole", task)
    # Once for the step, once to count its FLOPs.
    assert task.traces == 2 * len(task.buckets)
    compiled = [
        record.message for record in caplog.records if "compiled the step" in record.message
    ]
    assert [text.split(" in ")[0] for text in compiled] == [
        "compiled the step for shape 1 of 2",
        "compiled the step for shape 2 of 2",
    ]
    assert "text float32[16, 3, 6]" in compiled[0]
    assert "unused" not in compiled[0]
    tokens = [row[-1] for row in curve(tmp_path / "whole")]
    assert tokens == [31, 31, 46, 46] * 2  # 1, 2, 3, 1, … of 3 tokens and 1, 2, …, 5, 1, … of 5
    for steps in (3, 8):  # between two batches of the second shape
        train(tmp_path / "parts", Bucketed(), steps=steps)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    train(tmp_path / "one", Bucketed(), devices=1)
    one, eight = ([row[1] for row in curve(tmp_path / name)] for name in ("one", "whole"))
    np.testing.assert_allclose(one, eight, atol=1e-5, rtol=0)


def test_rates_are_those_of_the_shapes_that_ran(tmp_path, monkeypatch):
    ticks, tick = [], Clock.tick
    monkeypatch.setattr(
        Clock, "tick", lambda self, **given: (ticks.append(given), tick(self, **given))
    )
    monkeypatch.setattr(loop.flops, "peak_flops", lambda kind: 1e12)
    train(tmp_path, Bucketed(), devices=1, log_every=4)
    short, long = ticks[0], ticks[2]
    assert [one["model_flops"] for one in ticks] == [
        one["model_flops"] for one in (short, short, long, long) * 2
    ]
    # The rest of the step is the same: two tokens more in each of 16 texts, forward and backward.
    more = 2 * 16 * 2 * (2 * 6 * 16)
    assert long["model_flops"] - short["model_flops"] == more
    for line in (line for line in read_metrics(tmp_path) if "mfu" in line):
        flops = 2 * (short["model_flops"] + long["model_flops"])
        tokens = line["tokens_per_second_per_chip"] / (2 * (31 + 46))
        assert line["mfu"] == pytest.approx(flops * tokens / 1e12, rel=1e-6)


def test_a_shape_that_is_not_declared_is_named(tmp_path):
    with pytest.raises(DataError, match=r"(?s)one of the declared shapes \(1\. image.*") as error:
        train(tmp_path / "a", Bucketed(buckets=(3, 4), declared=(3, 5)))
    assert "1. image float32[16, 12], text float32[16, 3, 6], " in str(error.value)
    assert "; 2. image float32[16, 12], text float32[16, 5, 6], " in str(error.value)
    assert "found image float32[16, 12], text float32[16, 4, 6]" in str(error.value)
    message = r"expected a batch of the declared shape, text .*\[16, 3, 6\].* found text .*16, 4, 6"
    with pytest.raises(DataError, match=message):
        train(tmp_path / "b", Bucketed(buckets=(3, 4), declared=(3,)))
    with pytest.raises(
        ConfigError, match=r"declares batches of \[16\] rows, train.batch_size is 8"
    ):
        train(tmp_path / "c", Bucketed(), batch_size=8)
