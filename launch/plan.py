"""Compiles the training step of a config for TPU slices that are not there, and prints its needs.

    python -m launch.plan --config=configs/clip/scenes.py --slice=v5e-16,v5p-128 --sweep --price=1.2

For each slice: bytes per chip, FLOPs, traffic between chips, the roofline of a step, arrays that
hold the whole batch on a chip. Exits with 1 if a step does not fit. `--sweep` tries meshes, with
and without recomputation, and sorts them by roofline. Needs libtpu (`make tpu` installs it), no
data and no weights.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags

from launch import common
from perception_jax.errors import ConfigError, PerceptionError

_GIB, _TERA = 2**30, 1e12
_TENSOR = (1, 2, 4, 8)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    flags.DEFINE_list(
        "slice", None, "Slices, e.g. v5e-16 or v5p-128.", required=True, flag_values=values
    )
    flags.DEFINE_bool(
        "sweep", False, "Also tries other meshes, and recomputation.", flag_values=values
    )
    flags.DEFINE_float(
        "price", None, "USD per chip and hour, for the cost of the run.", flag_values=values
    )
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
    print(_HEADER, flush=True)
    for slice_ in found:
        tried = []
        for settings in _candidates(config, slice_.chips, sweep=parsed.flags.sweep):
            plan = {"remat": settings.get("remat"), **compiled(settings, slice_.name, parsed.flags)}
            print(row(plan), flush=True)
            tried.append(plan)
        fits = fits and any(plan["fits"] for plan in tried)
        plans += sorted(tried, key=lambda plan: (not plan["fits"], plan["step_seconds"]))
    for plan in plans[: len(plans) if not parsed.flags.sweep else 1]:
        print("\n" + "\n".join(details(plan, config["train"]["steps"], parsed.flags.price)))
    if parsed.flags.json:
        write_whole(pathlib.Path(parsed.flags.json), json.dumps(plans, indent=2) + "\n")
    return 0 if fits else 1


def compiled(config: Mapping[str, Any], slice_: str, values: flags.FlagValues) -> dict[str, Any]:
    """Compiles in a process of its own; returns `StepPlan.to_json`.

    Raises:
      ConfigError: the mesh, the batch or the config cannot be planned.
      PerceptionError: the process failed or took longer than `--timeout`.
    """
    from perception_jax.shard import slices

    libtpu = pathlib.Path(sys.prefix) / "libtpu"  # where `make tpu` installs it
    paths = [str(pathlib.Path.cwd()), str(libtpu), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | slices.ENVIRONMENT
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
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
    return answer["plan"]


def work() -> None:
    """Compiles the request on stdin; the last line of stdout is a plan or an error as JSON.

    JAX decides at its start which platforms it uses, so that this needs a process of its own.
    """
    import ml_collections

    from launch.systems import planning_program
    from perception_jax.shard import slices
    from perception_jax.train.config import TrainConfig
    from perception_jax.train.plan import make_plan

    request = json.load(sys.stdin)
    config = ml_collections.ConfigDict(request["config"])
    try:
        found = slices.find(request["slice"])
        task, batch = planning_program(config).shapes(config)
        settings = TrainConfig.from_mapping(config.train.to_dict())
        plan = make_plan(task, settings, batch, found, slices.devices(found))
    except PerceptionError as error:
        print(json.dumps({"error": str(error)}))
    else:
        print(json.dumps({"plan": plan.to_json()}))


def _candidates(config: Mapping[str, Any], chips: int, *, sweep: bool) -> Iterator[dict[str, Any]]:
    """The config itself, or all meshes of a slice that divide its batch."""
    if not sweep:
        yield dict(config)
        return
    rows = config["train"]["batch_size"]
    for remat in (False, True) if "remat" in config else (None,):
        for tensor in _TENSOR:
            if chips % tensor or rows % (chips // tensor):
                continue
            mesh = {"replica": 1, "fsdp": chips // tensor, "tensor": tensor}
            changed = {**config, "train": {**config["train"], "mesh": mesh}}
            yield changed if remat is None else changed | {"remat": remat}


_HEADER = (
    "slice      mesh        remat    batch   args GiB   temp GiB  total GiB   of GiB  fits"
    "  TFLOP/step  ICI GB   step ms   MFU <="
)


def row(plan: Mapping[str, Any]) -> str:
    """One line of the table."""
    mesh = "×".join(str(size) for size in plan["mesh"].values())
    total = plan["total_bytes"]
    sent = sum(plan["collective_bytes"].values())
    remat = {None: "-", True: "yes", False: "no"}[plan["remat"]]
    return (
        f"{plan['slice']:10} {mesh:11} {remat:5} {plan['batch_size']:8} "
        f"{plan['argument_bytes'] / _GIB:10.2f} {plan['temporary_bytes'] / _GIB:10.2f} "
        f"{'-' if total is None else f'{total / _GIB:.2f}':>10} "
        f"{plan['available_bytes'] / _GIB:8.2f}  {'yes' if plan['fits'] else 'NO':4} "
        f"{plan['hardware_flops'] / _TERA:11.2f} {sent / 1e9:7.2f} "
        f"{1e3 * plan['step_seconds']:9.2f} {100 * plan['mfu_ceiling']:7.1f}%"
    )


def details(plan: Mapping[str, Any], steps: int, price: float | None) -> list[str]:
    """Lines about one plan."""
    chips = 1
    for size in plan["mesh"].values():
        chips *= size
    path, size = plan["replicated"]
    seconds = [f"{name} {1e3 * plan[f'{name}_seconds']:.2f}" for name in _PARTS]
    lines = [
        f"{plan['slice']}, mesh {plan['mesh']}, {chips} chips",
        f"  parameters   {plan['trained'] / 1e6:.1f} M trained, {plan['frozen'] / 1e6:.1f} M "
        f"frozen; state {plan['state_bytes'] / _GIB:.3f} GiB a chip",
        f"  FLOPs        {plan['model_flops'] / _TERA:.2f} T of the model, "
        f"{plan['hardware_flops'] / _TERA:.2f} T with recomputation, all chips together",
        f"  roofline     {', '.join(seconds)} ms",
        f"  replicated   {path or 'nothing'} ({size / 2**20:.2f} MiB) is the largest on every chip",
    ]
    lines += [f"  {'traffic' if k == 0 else '':12} {x}" for k, x in enumerate(plan["collectives"])]
    if plan["whole_batch"]:
        lines.append(f"  WHOLE BATCH  on every chip: {'; '.join(plan['whole_batch'][:4])}")
    if not plan["fits"]:
        lines.append(f"  does not fit {advice(plan, chips)}")
    if price is not None:
        hours = steps * plan["step_seconds"] / 3600
        lines.append(
            f"  cost         at least {hours:.2f} h for {steps} steps, "
            f"{hours * chips * price:,.2f} USD at {price:g} a chip and hour"
        )
    return lines


_PARTS = ("compute", "memory", "communication")


def advice(plan: Mapping[str, Any], chips: int) -> str:
    """What to change so that a step fits, the most effective first."""
    state, free = plan["state_bytes"], plan["available_bytes"]
    if state > free:
        return (
            f"The state alone takes {state / _GIB:.1f} GiB a chip: split it further "
            "(train.mesh.fsdp, train.mesh.tensor) or take a larger slice."
        )
    shards = plan["mesh"]["replica"] * plan["mesh"]["fsdp"]
    rows = int(plan["batch_size"] * (free - state) / max(plan["temporary_bytes"], 1))
    rows -= rows % shards
    ideas: Sequence[str] = [
        *(["recompute activations (--config.remat=True)"] if plan["remat"] is False else []),
        *([f"a batch of about {rows} rows (train.batch_size)"] if rows else []),
        *(["train.mesh.tensor=2 or more"] if plan["mesh"]["tensor"] < min(chips, 8) else []),
        "a larger slice",
    ]
    return (
        f"Temporaries take {plan['temporary_bytes'] / _GIB:.1f} GiB a chip: {', or '.join(ideas)}."
    )


if __name__ == "__main__":
    common.start(PROGRAM, run)
