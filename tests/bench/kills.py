"""Kills training runs at random moments, resumes them and compares with an uninterrupted run.

    python -m tests.bench.kills --kills 12
    python -m tests.bench.kills --kills 50 toy

A run is killed (SIGKILL) and started again until a start ends before its moment comes; then its
metrics, the rates excepted, and its results must be those of the uninterrupted run, bit for bit. Of
four starts one is killed before its first step (imports, restoring, compilation), the others up to
12 steps later, in a step, a save, an evaluation or the report. "toy" is `tests.killing`: a run
that starts in a second and is also killed at chosen points (inside a save, at an epoch's end, …).
Exits with 1 if a run cannot be resumed or differs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from launch import compile_cache
from perception_jax.train.metrics import read_metrics
from tests import killing

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = {
    "clip": ("configs/clip/scenes.py:runlocal", "--config.evaluation.scenes=8"),
    "give": ("configs/give/scenes.py:runlocal", "--config.train.tensorboard=False"),
}
"""Config file and an override, by name."""
SETTINGS = {"steps": 60, "log_every": 1, "evaluate_every": 20, "checkpoint_every": 3}
TOY = "toy"


def command(name: str, workdir: pathlib.Path) -> list[str]:
    config, override = CONFIGS[name]
    settings = [f"--config.train.{key}={value}" for key, value in SETTINGS.items()]
    shorter = ["--config.data.length=60", override]
    start = [sys.executable, "-m", "launch.train", f"--config={config}", f"--workdir={workdir}"]
    return start + settings + shorter


def start(name: str, workdir: pathlib.Path, rng: random.Random | None) -> str:
    """Runs until the end or, with `rng`, until a random moment. Returns where it was killed."""
    log = workdir.with_suffix(".log")
    with log.open("w") as output:
        child = subprocess.Popen(command(name, workdir), cwd=ROOT, stdout=output, stderr=output)
    try:
        child.wait(None if rng is None else _moment(child, workdir, rng))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return f"at step {_step(workdir)}"
    if child.returncode:
        raise SystemExit(f"{log.read_text()}\n{name}: {workdir} ended with {child.returncode}")
    return ""


def _moment(child: subprocess.Popen, workdir: pathlib.Path, rng: random.Random) -> float:
    """Waits for a random step; returns the seconds from then to the kill."""
    if rng.random() < 0.25:
        return rng.uniform(0, 8)
    wanted = _step(workdir) + rng.randint(1, 12)
    while child.poll() is None and _step(workdir) < min(wanted, SETTINGS["steps"]):
        time.sleep(0.005)
    return rng.uniform(0, 0.5)


def _step(workdir: pathlib.Path) -> int:
    return max((line["step"] for line in read_metrics(workdir)), default=0)


def outcome(workdir: pathlib.Path) -> list[dict[str, object]]:
    """Metrics without rates, and the results."""
    lines = [
        {key: value for key, value in line.items() if key not in killing.RATES}
        for line in read_metrics(workdir)
    ]
    return [*lines, json.loads((workdir / "results.json").read_text())]


def series(name: str, kills: int, folder: pathlib.Path, rng: random.Random) -> None:
    """Kills and resumes until there were so many kills and the last run has ended."""
    start(name, folder / "whole", None)
    expected = outcome(folder / "whole")
    print(f"{name}: {len(expected)} lines without a kill", flush=True)
    done, runs = 0, 0
    while done < kills:
        workdir, here = folder / f"killed{runs}", []
        while where := start(name, workdir, rng if done < kills else None):
            done += 1
            here.append(where)
        same = outcome(workdir) == expected
        print(f"{name}: run {runs}: killed {', '.join(here) or 'never'}: equal {same}", flush=True)
        if not same:
            raise SystemExit(f"{name}: {workdir} differs from the uninterrupted run")
        runs += 1
    print(f"{name}: {done} of {done} kills resumed bit-equal, {runs} runs", flush=True)


def toy(kills: int, seed: int) -> None:
    """Kills the toy run; prints how many kills there were at each point."""
    with tempfile.TemporaryDirectory() as folder, killing.Server(ROOT) as server:
        start = time.monotonic()
        done = killing.series(server, pathlib.Path(folder), kills, seed)
        for point, count in done.most_common():
            print(f"  {count:4d} {point}")
        print(
            f"{TOY}: {done.total()} of {done.total()} kills resumed bit-equal, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12, help="of each config")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    names = [*CONFIGS, TOY]
    parser.add_argument("names", nargs="*", default=names, help=f"of {names}")
    flags = parser.parse_args()
    compile_cache.enable()  # for the children
    for name in flags.names:
        if name == TOY:
            toy(flags.kills, flags.seed)
            continue
        with tempfile.TemporaryDirectory() as folder:
            series(name, flags.kills, pathlib.Path(folder), random.Random(flags.seed))


if __name__ == "__main__":
    main()
