"""Kills a toy run again and again, at random moments and at chosen points, and resumes it.

A server (`tests.forking`) has imported everything, so that a start takes a second.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import pathlib
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

from orbax.checkpoint import v1 as ocp

from perception_jax.train import checkpoint, frozen, integrity, loop, metrics, workdir
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from tests import forking
from tests.tiny_training import RECORDS, TinyTask, read_arrays

SETTINGS: dict[str, Any] = {
    "steps": 24,
    "batch_size": 16,
    "log_every": 1,
    "checkpoint_every": 3,
    "evaluate_every": 8,
    "keep": 2,
}
EPOCH = RECORDS // SETTINGS["batch_size"]
RATES = {"examples_per_second_per_chip", "mfu", "hfu", "input_wait", "seconds"}
"""Metrics that depend on the clock."""

POINTS = {
    "before frozen leaves are written": (frozen, "write"),
    "while frozen leaves are written": (ocp, "save_checkpointables"),
    "when a save begins": (checkpoint.Checkpoints, "save"),
    "after the arrays of a save": (integrity, "checksums"),
    "before a checkpoint gets its name": (integrity, "write_list"),
    "after an evaluation": (checkpoint.Checkpoints, "record_evaluation"),
    "between two lines of metrics": (metrics.Reporter, "training"),
    "when the settings are written": (workdir.Workdir, "record_config"),
    "while a checkpoint is restored": (checkpoint.Checkpoints, "_load"),
}
"""Functions at whose call, or a few milliseconds later, a run is killed."""
RANDOM, STEP, EPOCH_END = "after some seconds", "in a step", "at the end of an epoch"


def choose(rng: random.Random) -> dict[str, Any]:
    """A kill: one half at a random moment, the other at a point, the n-th time it is passed."""
    point = rng.choice([RANDOM] * len(POINTS) + [STEP, EPOCH_END, *POINTS])
    return {
        "point": point,
        "number": rng.randint(1, 4),
        "seconds": rng.uniform(0, 2.5) if point == RANDOM else rng.choice([0, 0.003, 0.03]),
    }


class Server(forking.Server):
    """Starts runs; a context manager."""

    def __init__(self, root: pathlib.Path) -> None:
        super().__init__(root, "tests.killing")

    def run(self, folder: pathlib.Path, kill: dict[str, Any] | None) -> bool:
        """Starts the run in `folder`; returns whether it ended before it was killed."""
        log = folder.with_suffix(".log")
        (code,) = self.start({"folder": str(folder), "kill": kill, "log": str(log)})
        if code not in (0, -signal.SIGKILL):
            raise AssertionError(f"exit code {code}:\n{log.read_text()[-4000:]}")
        return code == 0


def outcome(folder: pathlib.Path) -> Any:
    """All metrics but rates, and every number of the last checkpoint, as text.

    Raises:
      AssertionError: the optimizer has made another number of updates than asked.
    """
    lines = [
        {key: value for key, value in line.items() if key not in RATES}
        for line in read_metrics(folder)
    ]
    steps = checkpoint.steps(folder / "checkpoints")
    saved = folder / "checkpoints" / str(steps[-1])
    state = read_arrays(saved, "state")
    counts = {key: int(x) for key, x in state["opt_state"].items() if key.endswith("count")}
    assert {SETTINGS["steps"]} == set(counts.values()), counts
    return lines, steps, json.dumps(state, default=lambda leaf: leaf.tolist(), sort_keys=True)


def series(server: Server, folder: pathlib.Path, kills: int, seed: int) -> collections.Counter[str]:
    """Kills and resumes runs; returns how many kills there were at each point.

    Raises:
      AssertionError: a run that was killed differs from one that was not, or cannot be resumed.
    """
    rng, done = random.Random(seed), collections.Counter()
    server.run(folder / "whole", None)
    expected = outcome(folder / "whole")
    runs = 0
    while done.total() < kills:
        here, ended = [], False
        while not ended:
            kill = choose(rng) if done.total() < kills else None
            ended = server.run(folder / f"run{runs}", kill)
            if not ended:
                done[kill["point"]] += 1
                here.append(kill)
        assert outcome(folder / f"run{runs}") == expected, f"run {runs} differs, killed {here}"
        runs += 1
    return done


def _train(order: forking.Order) -> int:
    stop = _arm(order["kill"]) if order["kill"] else None
    config = TrainConfig.from_mapping(SETTINGS)
    result = loop.run(TinyTask(), config, pathlib.Path(order["folder"]), stop=stop)
    return 0 if result.finished else 3


def _arm(kill: dict[str, Any]) -> Callable[[int], bool] | None:
    """Makes this process kill itself; returns what the loop asks after each step."""
    point, left = kill["point"], [kill["number"]]

    def strike() -> None:
        left[0] -= 1
        if left[0] == 0:
            if kill["seconds"]:
                threading.Timer(kill["seconds"], _die).start()
            else:
                _die()

    if point == RANDOM:
        left[0] = 1
        strike()
        return None
    if point in (STEP, EPOCH_END):
        every = 1 if point == STEP else EPOCH
        return lambda done: done % every == 0 and bool(strike())
    owner, name = POINTS[point]
    real = getattr(owner, name)

    @functools.wraps(real)
    def struck(*args: Any, **more: Any) -> Any:
        strike()
        return real(*args, **more)

    setattr(owner, name, struck)
    return None


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    forking.serve(_train)
