"""Two real processes that train together: they end, stop, disagree and are continued by one."""

from __future__ import annotations

import contextlib
import pathlib
import re
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from tests.tiny_training import TinyTask, program, wait_for_line, wait_for_step

OPTIM = {"schedule": "constant"}
SETTINGS = {"steps": 12, "noise": 0.0, "checkpoint_every": 0, "optim": OPTIM}


@contextlib.contextmanager
def both(
    root: pathlib.Path,
    *workdirs: pathlib.Path,
    own: Any = ({}, {}),
    count: int = 2,
    started: Any = None,
    **more: Any,
) -> Iterator:
    """Two processes in one workdir, or each in its own; `own` holds settings of each.

    Or `count` processes, of which those in `started` are started.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with contextlib.ExitStack() as stack:
        shared = {**SETTINGS, "processes": count, "port": port, **more}
        own = (*own, *({},) * count)
        yield [
            stack.enter_context(
                program(
                    root, workdirs[index % len(workdirs)], **{**shared, **own[index]}, process=index
                )
            )
            for index in (range(count) if started is None else started)
        ]


def ends(children: list[Any], code: int = 0) -> list[tuple[str, str]]:
    """What they wrote; all must end, and with `code`."""
    said = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [code] * len(children), said
    return said


def losses(workdir: pathlib.Path) -> np.ndarray:
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return np.array([line["loss"] for line in lines])


def train(workdir: pathlib.Path, **more: Any) -> loop.TrainResult:
    """In this process, on two devices."""
    settings = {"steps": 12, "batch_size": 16, "log_every": 1, "checkpoint_every": 0}
    config = TrainConfig.from_mapping({**settings, "optim": OPTIM, **more})
    return loop.run(TinyTask(noise=0.0), config, workdir, devices=jax.devices()[:2])


def test_they_are_one_run_that_one_process_continues(root, tmp_path):
    with both(root, tmp_path / "two", steps=6, evaluate_every=3, devices=1) as children:
        said = ends(children)
    assert [out.splitlines()[-1] for out, _ in said] == ["finished 6", "finished 6"]
    assert train(tmp_path / "two", evaluate_every=3).finished  # 2 processes, then 1
    train(tmp_path / "one", evaluate_every=3)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5)
    evaluated = [
        [line["step"] for line in read_metrics(tmp_path / name) if "loss" not in line]
        for name in ("two", "one")
    ]
    assert evaluated == [[3, 6, 9, 12], [3, 6, 9, 12]]
    names = ("evaluate/norm/kernel", "evaluate/rows/first", "evaluate/rows/last")
    two, one = (
        [[line[key] for key in names] for line in read_metrics(tmp_path / name) if names[0] in line]
        for name in ("two", "one")
    )
    np.testing.assert_allclose(two, one, atol=1e-5)
    assert len({row[1] for row in one}) == 4  # the model learns between evaluations


@pytest.mark.slow
def test_a_run_of_one_process_is_continued_by_two(root, tmp_path):
    train(tmp_path / "two", steps=6)
    with both(root, tmp_path / "two", devices=1) as children:
        ends(children)
    train(tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_the_same_step(root, tmp_path):
    with both(root, tmp_path, steps=1000, pause=0.25) as children:
        wait_for_step(children[1], 3)
        children[1].send_signal(signal.SIGTERM)
        said = ends(children)
    first, second = (out.splitlines()[-1] for out, _ in said)
    assert first == second
    assert first.startswith("stopped")
    assert (tmp_path / "checkpoints" / first.split()[1]).is_dir()


def test_a_signal_to_one_ends_the_evaluation_of_both(root, tmp_path):
    passes = 400
    with both(root, tmp_path, passes=passes, steps=4, evaluate_every=2, devices=1) as children:
        wait_for_line(children[1], "pass 1")
        children[1].send_signal(signal.SIGTERM)
        said = ends(children)
    assert [out.splitlines()[-1] for out, _ in said] == ["stopped 2", "stopped 2"]
    assert not any(f"pass {passes - 1}\n" in out for out, _ in said)
    assert len(losses(tmp_path)) == 2
    assert train(tmp_path, steps=4, evaluate_every=2).finished  # makes up for that evaluation
    evaluated = [line["step"] for line in read_metrics(tmp_path) if "loss" not in line]
    assert evaluated == [2, 4]


@pytest.mark.slow
def test_different_settings_are_named_at_the_start(root, tmp_path):
    with both(root, tmp_path, own=({"seed": 1}, {"seed": 2, "steps": 9})) as children:
        said = ends(children, 1)
    for _, errors in said:
        assert "train.seed: 1 on process 0, 2 on process 1" in errors
        assert "train.steps: 12 on process 0, 9 on process 1" in errors


@pytest.mark.slow
def test_workdirs_that_are_not_shared_are_named_at_the_start(root, tmp_path):
    with both(root, tmp_path / "a", tmp_path / "b") as children:
        said = ends(children, 1)
    for _, errors in said:
        assert f"process 0: {tmp_path}/a on " in errors
        assert f"process 1: {tmp_path}/b on " in errors
    assert not list(tmp_path.glob("*/.token*"))


@pytest.mark.slow
def test_what_fails_on_one_is_said_by_both(root, tmp_path):
    with contextlib.ExitStack() as stack:
        owner = stack.enter_context(program(root, tmp_path, steps=10_000, pause=0.05))
        wait_for_step(owner, 1)
        children = stack.enter_context(both(root, tmp_path))
        said = ends(children, 1)
    assert f"in use by process {owner.pid} on " in said[0][1]
    assert "process 0 of this run failed (opening the workdir): TrainingError" in said[1][1]


@pytest.mark.slow
def test_batches_of_different_shapes_end_both(root, tmp_path):
    """Their programs would wait for each other forever."""
    with both(root, tmp_path, own=({}, {"shift": 1}), buckets=(3, 5), devices=1) as children:
        said = ends(children, 1)
    for _, errors in said:
        assert "batches of different shapes at one step (process 0: 1. image" in errors
        assert "process 1: 2. image" in errors


@pytest.mark.slow
def test_they_train_on_several_shapes(root, tmp_path):
    with both(root, tmp_path, buckets=(3, 5), devices=1) as children:
        ends(children)
    assert len(losses(tmp_path)) == 12


HEARTBEAT = 2.0


@pytest.mark.parametrize("dying", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_that_dies_is_named_by_the_other(root, tmp_path, dying):
    with both(root, tmp_path, steps=10_000, heartbeat_seconds=HEARTBEAT) as children:
        wait_for_step(children[1], 3)
        children[dying].send_signal(signal.SIGKILL)
        start = time.monotonic()
        other = children[1 - dying]
        _, errors = other.communicate(timeout=120)
        assert time.monotonic() - start < HEARTBEAT + 10
    assert other.returncode != 0
    if dying == 0:  # JAX aborts: the coordination service is gone
        assert re.search(r"leader task|UNAVAILABLE", errors), errors
    else:
        assert f"process 1 of 2 on {socket.gethostname()} was last seen" in errors
        assert "start the same command on all of them again" in errors


def test_one_that_fails_is_named_by_the_other(root, tmp_path):
    own = ({}, {"fail_at": 3})
    with both(root, tmp_path, own=own, steps=10_000, heartbeat_seconds=HEARTBEAT) as children:
        _, errors = children[0].communicate(timeout=120)
        _, own_error = children[1].communicate(timeout=120)
    assert (children[0].returncode, "ValueError: no such row" in own_error) == (1, True)
    assert f"process 1 of 2 on {socket.gethostname()} failed (ValueError: no such row" in errors


@pytest.mark.parametrize("absent", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_host_that_does_not_come_is_named_with_a_hint(root, tmp_path, absent):
    started = [1 - absent]
    with both(root, tmp_path, started=started, join_seconds=5) as (child,):
        _, errors = child.communicate(timeout=120)
    assert child.returncode != 0
    host = socket.gethostname()
    if absent == 1:
        assert f"Process 0 of 2 on {host} is still waiting for the others: 1 of 2 have" in errors
    else:
        assert f"Process 1 of 2 on {host} is still waiting for process 0, expected at" in errors
    assert "Start the same command on every host" in errors


@pytest.mark.slow
def test_four_processes_train_to_the_end(root, tmp_path):
    with both(root, tmp_path / "four", count=4, devices=1) as children:
        ends(children)
    train(tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "four"), losses(tmp_path / "one"), atol=1e-5)
