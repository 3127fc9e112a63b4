"""A step that does not advance is reported, and how a run ends tells how far it came."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import jax
import pytest

from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.watchdog import Watchdog
from tests.tiny_training import TinyTask


class Slow(TinyTask):
    """Its data pause once."""

    def datasets(self) -> dict[str, Any]:
        count, rows = iter(range(1, 1000)), super().datasets()["train"]

        def pause(batch: Any) -> Any:
            if next(count) == 3:
                wait_for_a_while()
            return batch

        return {"train": rows.map(pause)}


def wait_for_a_while() -> None:
    time.sleep(1.5)


def test_a_step_that_does_not_advance_is_reported_with_its_threads(tmp_path, caplog):
    settings = {"steps": 4, "batch_size": 16, "log_every": 1, "watchdog_seconds": 0.3}
    with caplog.at_level("WARNING"):
        result = loop.run(
            Slow(), TrainConfig.from_mapping(settings), tmp_path, devices=jax.devices()[:1]
        )
    assert result.finished  # a report stops nothing
    files = sorted(tmp_path.glob("stalled_step_*_host_0.txt"))
    assert any("wait_for_a_while" in file.read_text() for file in files)
    assert f"this process goes on; {files[0]} has where its threads are" in caplog.text
    assert "s after the one before" in caplog.text


def reports(folder: pathlib.Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_an_evaluation_is_no_step(tmp_path):
    with Watchdog(tmp_path, 0.1) as watchdog:
        time.sleep(0.3)
        assert not reports(tmp_path)  # the first step compiles
        watchdog.advanced(1)
        with watchdog.paused():
            time.sleep(0.3)
        assert not reports(tmp_path)
        watchdog.advanced(2)
        time.sleep(0.4)
    assert reports(tmp_path) == ["stalled_step_3_host_0.txt"]


def test_the_limit_follows_the_median_step(tmp_path):
    watchdog = Watchdog(tmp_path, 0.0)
    assert watchdog._limit() == 60
    watchdog._durations.extend([1.0, 10.0, 10.0, 500.0])
    assert watchdog._limit() == 200
    assert Watchdog(tmp_path, 7.0)._limit() == 7


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, caplog):
    with caplog.at_level("WARNING"), Watchdog(tmp_path / "gone", 0.1) as watchdog:
        watchdog.advanced(1)
        time.sleep(0.4)
    assert "could not be written" in caplog.text


@pytest.mark.parametrize("value", [-1.0, "soon"])
def test_settings_of_the_watch_are_checked(value):
    from perception_jax.errors import ConfigError

    for name in ("watchdog_seconds", "heartbeat_seconds"):
        with pytest.raises(ConfigError, match=name):
            TrainConfig.from_mapping({"steps": 1, "batch_size": 1, name: value})
