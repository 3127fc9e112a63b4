"""Repeats a run of several processes on this machine and counts how often all of them end well.

    python -m tests.bench.processes --times 20
    python -m tests.bench.processes --times 20 --processes 4 --load 4

`--load N` keeps N processes busy beside it. Exits with 1 if a run did not end, ended in another
state than the first one, or with an exit code other than 0.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from perception_jax.train.metrics import read_metrics
from tests.tiny_training import program

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = {"steps": 12, "noise": 0.0, "checkpoint_every": 4, "evaluate_every": 6, "devices": 1}
SECONDS = 300
"""Until a run counts as hanging."""


def train(workdir: pathlib.Path, processes: int) -> str:
    """One run; returns what went wrong, "" if nothing did."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        settings = {**SETTINGS, "processes": processes, "port": probe.getsockname()[1]}
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(program(ROOT, workdir, process=index, **settings))
            for index in range(processes)
        ]
        for index, child in enumerate(children):
            try:
                out, errors = child.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                return f"process {index} did not end in {SECONDS} s"
            if child.returncode or out.splitlines()[-1] != f"finished {SETTINGS['steps']}":
                return f"process {index} ended with {child.returncode}:\n{errors[-2000:]}"
    return ""


def losses(workdir: pathlib.Path) -> list[float]:
    return [line["loss"] for line in read_metrics(workdir) if "loss" in line]


@contextlib.contextmanager
def load(count: int) -> Iterator[None]:
    """Keeps so many processes busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--load", type=int, default=0, help="busy processes beside it")
    flags = parser.parse_args()
    good, expected, seconds = 0, None, []
    with tempfile.TemporaryDirectory() as folder, load(flags.load):
        for time_ in range(flags.times):
            workdir, start = pathlib.Path(folder, str(time_)), time.monotonic()
            why = train(workdir, flags.processes)
            seconds.append(time.monotonic() - start)
            if not why:
                found = losses(workdir)
                expected = expected or found
                why = "" if found == expected else f"other losses: {found} instead of {expected}"
            good += not why
            if why:
                print(f"run {time_}: {why}", flush=True)
    print(
        f"{good} of {flags.times} runs of {flags.processes} processes ended well "
        f"(load {flags.load}; {min(seconds):.1f} to {max(seconds):.1f} s each)"
    )
    raise SystemExit(good < flags.times)


if __name__ == "__main__":
    main()
