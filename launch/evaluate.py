"""Runs the evaluation of a config on a checkpoint, with a report.

    python -m launch.evaluate --config=configs/clip/scenes.py --checkpoint=scenes-clip \
        --out=runs/eval
    python -m launch.evaluate --config=configs/quickstart.py --checkpoint=runs/quickstart \
        --out=runs/eval

Splits the work over all devices, prints the numbers and writes them to OUT/results.json, with
OUT/report.html. A contrastive model's embeddings are kept in OUT/predictions (`evals.runner`): an
evaluation that was stopped goes on from there.
"""

from __future__ import annotations

import pathlib
from typing import Any

from absl import flags

from launch import common, compile_cache
from perception_jax.errors import ConfigError


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    flags.DEFINE_string(
        "checkpoint",
        None,
        "A training workdir (or one of its checkpoints), a checkpoint folder, the name of shipped "
        "weights, or a hub id; for GiVE also adapters, for a language model also LoRA of PEFT.",
        required=True,
        flag_values=values,
    )
    flags.DEFINE_string("out", None, "Folder of the results.", required=True, flag_values=values)
    flags.DEFINE_integer(
        "step", None, "Which checkpoint of a workdir; the newest by default.", flag_values=values
    )


PROGRAM = common.Program(name="evaluate", define=define_flags, config=True)
"""The command line of this program."""


def run(parsed: common.Parsed) -> int:
    """Evaluates; returns 0."""
    from launch.systems import training_program

    program, out = training_program(parsed.config), pathlib.Path(parsed.flags.out)
    task, model = _task_and_model(program, parsed)
    out.mkdir(parents=True, exist_ok=True)
    program.report(parsed.config, task, model, out)
    return 0


def _task_and_model(program: Any, parsed: common.Parsed) -> tuple[Any, Any]:
    import jax

    from perception_jax.shard.mesh import make_mesh
    from perception_jax.train import restore

    compile_cache.skip_several_cpu_devices()
    mesh = make_mesh() if jax.device_count() > 1 else None
    source, step = parsed.flags.checkpoint, parsed.flags.step
    folder = pathlib.Path(source)
    if (folder / "checkpoints").is_dir() or (folder / "meta").is_dir():
        task = program.task(parsed.config)
        model, done = restore.load_model(task, folder, step=step, mesh=mesh)
        print(f"{source}: step {done}")
        return task, model
    if step is not None:
        raise ConfigError(f"--step={step} goes with a training workdir; {source} is none.")
    loaded = program.load(source, parsed.config, mesh)
    return program.task(parsed.config, loaded), loaded.model


if __name__ == "__main__":
    common.start(PROGRAM, run)
