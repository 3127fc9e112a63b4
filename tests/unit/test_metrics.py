"""The log of a run: rates, resumed files, TensorBoard on request."""

from __future__ import annotations

import json
import pathlib
import struct
import sys
import time
from collections.abc import Iterator

import pytest
from tensorboardX.proto.event_pb2 import Event

from perception_jax.errors import ConfigError
from perception_jax.train.metrics import Clock, Reporter, read_metrics


def report(workdir: pathlib.Path, step: int = 0, tensorboard: bool = False) -> Reporter:
    return Reporter(workdir, step=step, steps=10, tensorboard=tensorboard, active=True)


def test_clock_rates_by_hand(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(batch_size=32, devices=4, peak_flops=1e6)
    for turn in range(5):
        with clock.waiting():
            now[0] += 0.1
        now[0] += 0.4
        more = turn % 2  # two shapes in turn
        clock.tick(model_flops=2_000_000 + more, hardware_flops=3_000_000 + more)
    rates = clock.read()
    assert rates["examples_per_second_per_chip"] == pytest.approx(5 * 32 / 2.5 / 4)
    assert rates["mfu"] == pytest.approx((5 * 2e6 + 2) / 2.5 / (1e6 * 4), rel=1e-9)
    assert rates["hfu"] == pytest.approx((5 * 3e6 + 2) / 2.5 / (1e6 * 4), rel=1e-9)
    assert "tokens_per_second_per_chip" not in rates
    assert rates["input_wait"] == pytest.approx(0.2)
    assert rates["seconds"] == pytest.approx(2.5)
    now[0] += 1.0
    assert clock.read()["examples_per_second_per_chip"] == 0.0  # a new window
    for tokens in (100.0, 300.0):
        now[0] += 0.5
        clock.tick(model_flops=1, hardware_flops=1, tokens=tokens)
    assert clock.read()["tokens_per_second_per_chip"] == pytest.approx(400 / 4)


def test_mfu_is_null_where_the_peak_is_unknown():
    assert Clock(batch_size=1, devices=1, peak_flops=None).read()["mfu"] is None


def test_lines_that_will_be_done_again_are_dropped(tmp_path: pathlib.Path):
    first = report(tmp_path)
    for step in (1, 2, 3, 4):
        first.training(step, {"loss": step / 3})
    first.evaluation(4, {"evaluate/a/b": float("nan")})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # what a kill leaves
    second = report(tmp_path, step=2)
    second.training(3, {"loss": 1.0})
    second.close()
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0)]


def test_numbers_that_are_not_finite_become_null(tmp_path: pathlib.Path):
    reporter = report(tmp_path)
    reporter.evaluation(1, {"evaluate/a/b": float("nan"), "evaluate/a/c": float("inf")})
    reporter.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "evaluate/a/b": None, "evaluate/a/c": None}


def test_only_the_active_process_writes(tmp_path: pathlib.Path):
    silent = Reporter(tmp_path, step=0, steps=10, tensorboard=True, active=False)
    silent.training(1, {"loss": 1.0})
    silent.close()
    assert not list(tmp_path.iterdir())


def test_missing_tensorboard_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="pip install tensorboardX"):
        report(tmp_path, tensorboard=True)


def events(file: pathlib.Path) -> Iterator[Event]:
    """Records of a TensorBoard file: length, checksum, an `Event`, checksum."""
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_tensorboard_files_hold_the_numbers(tmp_path: pathlib.Path):
    reporter = report(tmp_path, tensorboard=True)
    reporter.training(3, {"loss": 0.5, "mfu": None})
    reporter.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert [(e.step, v.tag, v.simple_value) for e in events(file) for v in e.summary.value] == [
        (3, "loss", 0.5)
    ]
