"""Compiles the steps of a config for TPU slices that are not there, and prints what they need.

    python -m launch.plan --config=configs/clip/scenes.py --slice=v5e-16,v5p-128 --sweep --price=1.2
    python -m launch.plan --config=configs/text/serve.py --slice=v5e-4,v5e-8

A config of training has a step for each shape of its batches, one of serving two: the prefill and
a step of the decode loop. For each slice: bytes per chip, FLOPs, traffic between chips, the
roofline of a step, arrays that are whole on a chip and should not be. "2xv5e-256" are two slices,
whose mesh needs replicas (`--config.train.mesh.replica=2`). Exits with 1 if a step does not fit.
`--sweep` tries meshes and what the backward pass recomputes (`nn.stack.REMAT`), and sorts them by
roofline. Needs libtpu (`make tpu` installs it), no data and no weights.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from launch import common, plan_text
from perception_jax.errors import ConfigError, PerceptionError

if TYPE_CHECKING:
    import jax
    import ml_collections

    from perception_jax.shard.plan import ProgramPlan
    from perception_jax.shard.slices import Slice

_TENSOR = (1, 2, 4, 8)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    flags.DEFINE_list(
        "slice", None, "Slices, e.g. v5e-16 or v5p-128.", required=True, flag_values=values
    )
    flags.DEFINE_bool("sweep", False, "Tries meshes and remat policies.", flag_values=values)
    flags.DEFINE_float("price", None, "USD per chip and hour, for the cost.", flag_values=values)
    flags.DEFINE_string("json", None, "File for all numbers.", flag_values=values)
    flags.DEFINE_float("timeout", 3600.0, "Seconds for each compilation.", flag_values=values)


PROGRAM = common.Program(name="plan", define=define_flags, config=True)
"""The command line of this program."""


def run(parsed: common.Parsed) -> int:
    """Plans; returns 1 if no plan for one of the slices fits."""
    from launch.systems import planning_program
    from perception_jax.files import write_whole
    from perception_jax.shard import slices

    found = [slices.find(name) for name in parsed.flags.slice]
    planning_program(parsed.config)  # an unknown system ends here and not in another process
    config = json.loads(parsed.config.to_json_best_effort())
    plans, fits = [], True
    print(plan_text.HEADER, flush=True)
    for slice_ in found:
        tried: list[list[dict[str, Any]]] = []
        sweep = parsed.flags.sweep
        for settings in _candidates(config, slice_.chips, slice_.slices, sweep=sweep):
            steps = compiled(settings, slice_.name, parsed.flags)
            tried.append([{"remat": settings.get("remat"), **step} for step in _numbered(steps)])
            print("\n".join(map(plan_text.row, tried[-1])), flush=True)
        fits = fits and any(_fit(steps) for steps in tried)
        plans += sorted(tried, key=lambda steps: (not _fit(steps), steps[-1]["step_seconds"]))
    for step in itertools.chain(*plans[: len(plans) if not parsed.flags.sweep else 1]):
        steps = config["train"]["steps"] if step["kind"] == "training" else 0
        print("\n" + "\n".join(plan_text.details(step, steps, parsed.flags.price)))
    if parsed.flags.json:
        every = list(itertools.chain(*plans))
        write_whole(pathlib.Path(parsed.flags.json), json.dumps(every, indent=2) + "\n")
    return 0 if fits else 1


def _numbered(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names each step by its kind, and by the number of its shape where several have one kind."""
    kinds = [step["kind"] for step in steps]
    numbers = [kinds[:k].count(kind) + 1 for k, kind in enumerate(kinds)]
    return [
        {"step": f"{kind} {number}" if kinds.count(kind) > 1 else kind, **step}
        for step, kind, number in zip(steps, kinds, numbers, strict=True)
    ]


def _fit(steps: Sequence[Mapping[str, Any]]) -> bool:
    return all(step["fits"] for step in steps)


def compiled(
    config: Mapping[str, Any], slice_: str, values: flags.FlagValues
) -> list[dict[str, Any]]:
    """Compiles in a process of its own; returns `ProgramPlan.to_json` of each step.

    Raises:
      ConfigError: the mesh, the batch or the config cannot be planned.
      PerceptionError: the process failed or took longer than `--timeout`.
    """
    from perception_jax.shard import slices

    libtpu = pathlib.Path(sys.prefix) / "libtpu"  # where `make tpu` installs it
    paths = [str(pathlib.Path.cwd()), str(libtpu), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | slices.ENVIRONMENT
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # Nothing runs on a TPU, so that several plans may be made at once.
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    # libtpu ends the process at a flag of XLA's CPU compiler that it does not know.
    for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"):
        environment.pop(name, None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from launch import plan; plan.work()"],
            input=json.dumps({"config": config, "slice": slice_}),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=values.timeout,
        )
    except subprocess.TimeoutExpired:
        raise PerceptionError(
            f"{slice_}: the compilation took longer than {values.timeout:.0f} s (--timeout)."
        ) from None
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise PerceptionError(f"{slice_}: compiling failed: {last[0]}") from None
    if "error" in answer:
        raise ConfigError(f"{slice_}: {answer['error']}")
    return answer["plans"]


def work() -> None:
    """Compiles the request on stdin; the last line of stdout has plans or an error as JSON.

    JAX decides at its start which platforms it uses, so that this needs a process of its own.
    """
    import ml_collections

    from perception_jax.shard import slices

    request = json.load(sys.stdin)
    config = ml_collections.ConfigDict(request["config"])
    try:
        found = slices.find(request["slice"])
        plans = made(config, found, slices.devices(found))
    except PerceptionError as error:
        print(json.dumps({"error": str(error)}))
    else:
        print(json.dumps({"plans": [plan.to_json() for plan in plans]}))


def made(
    config: ml_collections.ConfigDict, found: Slice, devices: Sequence[jax.Device]
) -> Sequence[ProgramPlan]:
    """Plans of the steps of a config.

    Raises:
      ConfigError: the mesh, the batch or the config cannot be planned.
    """
    from launch.systems import Serves, planning_program
    from perception_jax.train.config import TrainConfig
    from perception_jax.train.plan import make_plan

    program = planning_program(config)
    if isinstance(program, Serves) and "train" not in config:
        return program.serving_plans(config, found, devices)
    task, batches = program.shapes(config)
    settings = TrainConfig.from_mapping(config.train.to_dict())
    return [make_plan(task, settings, batch, found, devices) for batch in batches]


def _candidates(
    config: Mapping[str, Any], chips: int, slices: int, *, sweep: bool
) -> Iterator[dict[str, Any]]:
    """The config itself, or all meshes of the slices that divide its batch."""
    if not sweep:
        yield dict(config)
        return
    from perception_jax.nn.stack import REMAT

    trains = "train" in config
    rows = (config["train"] if trains else config)["batch_size"]
    rows //= config["train"]["optim"]["accumulate"] if trains else 1
    for remat in REMAT if "remat" in config else (None,):
        for tensor in _TENSOR:
            if chips // slices % tensor or rows % (chips // tensor):
                continue
            mesh = {"replica": slices, "fsdp": chips // slices // tensor, "tensor": tensor}
            changed = {"train": {**config["train"], "mesh": mesh}} if trains else {"mesh": mesh}
            yield {**config, **changed, **({} if remat is None else _remat(config, remat))}


def _remat(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The setting by which all towers of a config have the policy of that name."""
    towers = config["remat"]
    return {"remat": dict.fromkeys(towers, name) if isinstance(towers, Mapping) else name}


if __name__ == "__main__":
    common.start(PROGRAM, run)
