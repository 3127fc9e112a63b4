"""Runs that are interrupted or resumed: evaluations, signals, workers, damaged files."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import pytest

from perception_jax.data import worker_watch
from perception_jax.data.workers import configure_grain, prefetch
from perception_jax.errors import CheckpointError, ConfigError, DataError
from perception_jax.train import checkpoint, integrity, loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.interrupt import Stopped
from perception_jax.train.metrics import read_metrics
from tests.tiny_training import TinyTask


def train(workdir: pathlib.Path, task: Any = None, *, stop: Any = None, **more: Any) -> Any:
    resolved, defaults = more.pop("resolved", None), more.pop("defaults", None)
    settings = {"steps": 4, "batch_size": 16, "log_every": 1, "checkpoint_every": 2, **more}
    return loop.run(
        task or TinyTask(),
        TrainConfig.from_mapping(settings),
        workdir,
        resolved_config=resolved,
        default_config=defaults,
        stop=stop,
        devices=jax.devices()[:1],
    )


def saved(workdir: pathlib.Path) -> list[int]:
    return checkpoint.steps(workdir / "checkpoints")


class Evaluated(TinyTask):
    """Calls `inside` in its first evaluation."""

    inside: Callable[[], Any] = staticmethod(lambda: None)

    def evaluators(self) -> dict[str, Any]:
        def first(model: Any, mesh: Any) -> dict[str, float]:
            inside, self.inside = self.inside, lambda: None
            inside()
            return {"score": 0.5}

        return {"first": first}


def scores(workdir: pathlib.Path) -> list[int]:
    return [line["step"] for line in read_metrics(workdir) if "evaluate/first/score" in line]


def test_a_run_is_saved_before_an_evaluator_fails(tmp_path):
    def fail() -> None:
        raise ValueError("no such class")

    task = Evaluated()
    task.inside = fail
    with pytest.raises(ValueError, match="no such class"):
        train(tmp_path, task, steps=6, checkpoint_every=0, evaluate_every=3)
    assert saved(tmp_path) == [3]
    again = train(tmp_path, Evaluated(), steps=6, checkpoint_every=0, evaluate_every=3)
    assert again.finished
    assert scores(tmp_path) == [3, 6]  # the evaluation that failed is made up for


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_an_evaluation(tmp_path, number):
    inherited = signal.signal(number, signal.SIG_DFL)  # under nohup a SIGHUP is ignored

    def hang() -> None:
        signal.raise_signal(number)
        pytest.fail("the evaluation went on")

    task = Evaluated()
    task.inside = hang
    try:
        result = train(tmp_path, task)
    finally:
        signal.signal(number, inherited)
    assert (result.step, result.finished) == (4, False)
    assert saved(tmp_path) == [2, 4]
    assert train(tmp_path, Evaluated()).finished
    assert scores(tmp_path) == [4]


class Waiting(TinyTask):
    """Its data stop coming at one step, as from a named pipe."""

    at: int = -1

    def datasets(self) -> dict[str, Any]:
        count, rows = iter(range(1, 1000)), super().datasets()["train"]

        def hang(batch: Any) -> Any:
            if next(count) == self.at:
                threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
                time.sleep(30)
            return batch

        return {"train": rows.map(hang)}


def test_a_signal_ends_a_wait_for_data(tmp_path):
    task = Waiting()
    task.at = 4
    start = time.monotonic()
    result = train(tmp_path / "waited", task, steps=6)
    assert time.monotonic() - start < 25
    assert (result.step, result.finished) == (3, False)
    assert saved(tmp_path / "waited") == [2, 3]
    train(tmp_path / "waited", steps=6)
    train(tmp_path / "whole", steps=6)
    curves = [
        [line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line]
        for name in ("waited", "whole")
    ]
    assert curves[0] == curves[1]
    task.at = 1
    with pytest.raises(Stopped):  # there is nothing to save yet
        train(tmp_path / "first", task)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_is_one_error(monkeypatch, number):
    monkeypatch.setattr(worker_watch, "STOPPED_SECONDS", 0.5)
    monkeypatch.setattr(worker_watch, "_POLL_SECONDS", 0.1)
    configure_grain()
    stream = prefetch(grain.MapDataset.range(100_000), 1)
    try:
        assert next(stream) == 0
        (worker,) = stream._watch._workers()
        os.kill(worker, number)
        message = {
            signal.SIGKILL: "was ended by SIGKILL",
            signal.SIGSTOP: rf"pid {worker}\) was stopped for",
        }
        with pytest.raises(DataError, match=f"{message[number]}.*Run the same command again"):
            collections.deque(stream, maxlen=0)
    finally:
        stream.close()


def test_workers_outlive_signals_to_the_process_group():
    configure_grain()
    stream = prefetch(grain.MapDataset.range(100_000), 1)
    try:
        assert next(stream) == 0
        (worker,) = stream._watch._workers()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            os.kill(worker, number)
        assert [next(stream) for _ in range(2000)] == list(range(1, 2001))
    finally:
        stream.close()


RESOLVED = {"data": {"length": 8}}


@pytest.mark.parametrize("content", [None, b'{"trainer": {"se', b"[]", b"\xff\xfe{}"])
def test_without_config_json_the_checkpoint_s_settings_hold(tmp_path, caplog, content):
    train(tmp_path, resolved=RESOLVED)
    config = tmp_path / "config.json"
    whole = config.read_text()
    config.unlink() if content is None else config.write_bytes(content)
    with pytest.raises(ConfigError, match=r"learning_rate: 0.001 before, 0.5 now"):
        train(tmp_path, resolved=RESOLVED, optim={"learning_rate": 0.5})
    with pytest.raises(ConfigError, match=r"data.length: 8 before, 9 now"):
        train(tmp_path, resolved={"data": {"length": 9}})
    with caplog.at_level("WARNING"):
        assert train(tmp_path, resolved=RESOLVED).finished
    assert f"{config} " in caplog.text
    assert config.read_text() == whole


def test_a_setting_that_older_settings_lack_has_its_default(tmp_path, caplog):
    train(tmp_path, resolved={"data": {"length": 8}})
    config = tmp_path / "config.json"
    meta = tmp_path / "checkpoints" / "4" / "meta" / "meta.json"
    for file in (config, meta):
        content = json.loads(file.read_text())
        del content["trainer"]["keep_best"], content["trainer"]["optim"]["clip_norm"]
        file.write_text(json.dumps(content))
    saved_at = meta.parent.parent
    integrity.write_list(saved_at, integrity.checksums(saved_at))
    new = {"data": {"length": 8, "flip": False}}
    with pytest.raises(ConfigError, match=r"flip: not set before, True now"):
        train(tmp_path, resolved={"data": {"length": 8, "flip": True}}, defaults=new)
    with pytest.raises(ConfigError, match=r"optim.clip_norm: .* before, 7.0 now"):
        train(tmp_path, resolved=new, defaults=new, optim={"clip_norm": 7.0})
    with caplog.at_level("WARNING"):
        train(tmp_path, resolved=new, defaults=new)
    assert "data.flip: the default False" in caplog.text
    assert "train.optim.clip_norm: the default" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b"[]", b"null", b'{"a": {"b": [1]}}', b'{"../x": [1, 2]}', b"{}", b"\xff", b"[" * 9000],
)
def test_a_list_of_files_that_is_none_means_a_damaged_checkpoint(tmp_path, caplog, content):
    train(tmp_path)
    (tmp_path / "checkpoints" / "4" / "files.json").write_bytes(content)
    with caplog.at_level("WARNING"):
        assert train(tmp_path).finished
    assert "checkpoints/4 is damaged (files.json" in caplog.text
    assert (tmp_path / "damaged_checkpoints" / "4").is_dir()


def test_damaged_lines_of_metrics_are_named_and_kept_aside(tmp_path, caplog):
    train(tmp_path)
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    hurt = b"".join([lines[0].replace(b"loss", b"lo\xffs"), lines[1][:20] + b"\n", *lines[2:]])
    file.write_bytes(hurt)
    with caplog.at_level("WARNING"):
        train(tmp_path, steps=6)
    assert "2 lines cannot be read (line 1: " in caplog.text
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == [3, 4, 5, 6]
    (aside,) = tmp_path.glob("metrics.damaged-*.jsonl")
    assert aside.read_bytes() == hurt


@pytest.mark.parametrize("where", ["checksums", "arrays"])
def test_a_good_checkpoint_stays_where_memory_runs_out(tmp_path, monkeypatch, where):
    train(tmp_path)

    def no_memory(*_: Any, **__: Any) -> Any:
        raise MemoryError("8 GiB")

    with monkeypatch.context() as patch:
        if where == "checksums":
            patch.setattr(integrity, "_checksum", no_memory)
        else:
            orbax = checkpoint.ocp.training.Checkpointer
            patch.setattr(orbax, "load_checkpointables", no_memory)
        with pytest.raises(CheckpointError, match=r"/4 cannot be .*MemoryError.*run the same"):
            train(tmp_path, steps=6)
    assert saved(tmp_path) == [2, 4]
    assert train(tmp_path, steps=6).finished
