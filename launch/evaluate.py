"""Evaluates a checkpoint on what a config file measures.

python -m launch.evaluate --config=configs/clip/scenes.py --checkpoint=scenes-clip --out=runs/eval
"""

from __future__ import annotations

import json
import pathlib
import sys

from launch import common
from perception_jax.errors import ConfigError

PROGRAM = common.Program(
    name="evaluate",
    description=(
        "Evaluates a checkpoint on what a config file measures, prints the numbers and writes them "
        "to OUT/results.json, with a report where the config makes one."
    ),
    flags=(
        common.Flag(
            "checkpoint",
            help="A training workdir (or one of its checkpoints), a checkpoint folder, the name of "
            "shipped weights, or a hub id; for GiVE also adapters.",
            required=True,
        ),
        common.Flag("out", pathlib.Path, help="Folder for the results.", required=True),
        common.Flag("step", int, help="Which checkpoint of a workdir; the newest by default."),
    ),
    examples=(
        "python -m launch.evaluate --config=configs/clip/scenes.py --checkpoint=scenes-clip "
        "--out=runs/eval",
        "python -m launch.evaluate --config=configs/quickstart.py --checkpoint=runs/quickstart "
        "--out=runs/eval",
    ),
)


def run(parsed: common.Parsed) -> int:
    """Evaluates; returns 0."""
    module, out = parsed.module, parsed.flags["out"]
    if not hasattr(module, "get_task"):
        raise ConfigError(
            f"{parsed.config_path}: to evaluate, a config file needs a function "
            "get_task(config, loaded=None)."
        )
    task, model = _task_and_model(parsed)
    out.mkdir(parents=True, exist_ok=True)
    if hasattr(module, "report"):
        module.report(parsed.config, task, model, out)
        return 0
    results = {
        f"{name}/{key}": float(value)
        for name, evaluator in task.evaluators().items()
        for key, value in evaluator(model).items()
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for key, value in results.items():
        print(f"  {key:40s} {value:.4g}")
    return 0


def _task_and_model(parsed: common.Parsed):
    from perception_jax import api
    from perception_jax.train import restore

    source, step = parsed.flags["checkpoint"], parsed.flags["step"]
    folder = pathlib.Path(source)
    if (folder / "checkpoints").is_dir() or (folder / "meta").is_dir():
        task = parsed.module.get_task(parsed.config)
        model, done = restore.load_model(task, folder, step=step)
        print(f"{source}: step {done}")
        return task, model
    if step is not None:
        raise ConfigError(f"--step={step} goes with a training workdir; {source} is none.")
    load = getattr(parsed.module, "load", None)
    loaded = api.load(source) if load is None else load(source, parsed.config)
    return parsed.module.get_task(parsed.config, loaded), loaded.model


if __name__ == "__main__":
    sys.exit(common.main(PROGRAM, run))
