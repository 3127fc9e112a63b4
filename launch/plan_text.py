"""Plans as text: a row of a table, details, and what to change where a step does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_GIB, _TERA = 2**30, 1e12
_PARTS = ("compute", "memory", "communication")

HEADER = (
    "slice      mesh        step        remat            batch   args GiB   temp GiB  total GiB"
    "   of GiB  fits       TFLOP   ICI GB    step ms  at most"
)
"""Heads of the columns of `row`."""


def row(plan: Mapping[str, Any]) -> str:
    """One line of the table."""
    mesh = "×".join(str(size) for size in plan["mesh"].values())
    total = plan["total_bytes"]
    found = plan["collective_bytes"]
    sent = "-" if found is None else f"{sum(found.values()) / 1e9:.4f}"
    return (
        f"{plan['slice']:10} {mesh:11} {_step(plan):11} {_remat(plan):13} {plan['batch_size']:8} "
        f"{plan['argument_bytes'] / _GIB:10.2f} {plan['temporary_bytes'] / _GIB:10.2f} "
        f"{'-' if total is None else f'{total / _GIB:.2f}':>10} "
        f"{plan['available_bytes'] / _GIB:8.2f}  {'yes' if plan['fits'] else 'NO':4} "
        f"{plan['hardware_flops'] / _TERA:11.3f} {sent:>8} "
        f"{1e3 * plan['step_seconds']:10.2f}  {_bound(plan)}"
    )


def _milliseconds(name: str, seconds: float | None) -> str:
    return f"{name} unknown" if seconds is None else f"{name} {1e3 * seconds:.2f} ms"


def _step(plan: Mapping[str, Any]) -> str:
    """The name of the step; `launch.plan` numbers those of several shapes."""
    return plan.get("step", plan["kind"])


def _remat(plan: Mapping[str, Any]) -> str:
    """The policy's name, or one for each tower where they differ."""
    names = plan["remat"]
    if isinstance(names, Mapping):
        names = "/".join(names.values() if len(set(names.values())) > 1 else [*names.values()][:1])
    return "-" if names is None else names


def _bound(plan: Mapping[str, Any]) -> str:
    """The speed that the roofline allows."""
    if plan["kind"] == "training":
        return f"MFU {100 * plan['mfu_ceiling']:.1f}%"
    return f"{plan['tokens_per_second']:.0f} tokens/s"


def details(plan: Mapping[str, Any], steps: int, price: float | None) -> list[str]:
    """Lines about one plan.

    Args:
      steps: of the whole run, for the cost of training.
      price: USD per chip and hour.
    """
    chips = math.prod(plan["mesh"].values())
    path, size = plan["replicated"]
    seconds = [_milliseconds(name, plan[f"{name}_seconds"]) for name in _PARTS]
    lines = [
        f"{plan['slice']}, {_step(plan)}, mesh {plan['mesh']}, {chips} chips",
        *(_training(plan) if plan["kind"] == "training" else _serving(plan)),
        f"  roofline     {', '.join(seconds)}",
        *(
            [f"  host memory  {plan['host_bytes'] / _GIB:.3f} GiB a chip"]
            if plan["host_bytes"]
            else []
        ),
        f"  replicated   {path or 'nothing'} ({size / 2**20:.2f} MiB) is the largest on every chip",
    ]
    lines += [f"  {'traffic' if k == 0 else '':12} {x}" for k, x in enumerate(plan["collectives"])]
    if plan["collective_bytes"] is None:
        why = (
            "the compiler refused the program"
            if plan["total_bytes"] is None
            else "jaxlib cannot read this program of libtpu; a plan for v5e, same mesh, has both"
        )
        lines.append(f"  traffic      unknown, and whether an array is whole: {why}.")
    if plan["dcn_bytes"]:
        lines.append(
            f"  to slices    {plan['dcn_bytes'] / 1e6:.1f} MB a chip and step over the data-centre "
            "network"
        )
    if plan["whole"]:
        lines.append(f"  WHOLE        on every chip: {'; '.join(plan['whole'][:4])}")
    if not plan["fits"]:
        lines.append(f"  does not fit {advice(plan, chips)}")
    if price is not None:
        lines.append(f"  cost         at least {_cost(plan, steps, chips, price)}")
    return lines


def _training(plan: Mapping[str, Any]) -> list[str]:
    return [
        f"  batch        {', '.join(f'{name} {shape}' for name, shape in plan['batch'].items())}",
        f"  parameters   {plan['trained'] / 1e6:.1f} M trained, {plan['frozen'] / 1e6:.1f} M "
        f"frozen; state {plan['state_bytes'] / _GIB:.3f} GiB a chip",
        f"  FLOPs        {plan['model_flops'] / _TERA:.2f} T of the model, "
        f"{plan['hardware_flops'] / _TERA:.2f} T with recomputation, all chips together",
        *([f"  accumulation {plan['accumulate']} micro-batches"] if plan["accumulate"] > 1 else []),
    ]


def _serving(plan: Mapping[str, Any]) -> list[str]:
    return [
        f"  memory       weights {plan['weight_bytes'] / _GIB:.3f}, cache "
        f"{plan['cache_bytes'] / _GIB:.3f} GiB a chip",
        f"  FLOPs        {plan['hardware_flops'] / _TERA:.3f} T for {plan['tokens']} tokens, "
        "all chips together",
    ]


def _cost(plan: Mapping[str, Any], steps: int, chips: int, price: float) -> str:
    if plan["kind"] == "training":
        hours = steps * plan["step_seconds"] / 3600
        done = f"{hours:.2f} h for {steps} steps, {hours * chips * price:,.2f} USD"
    else:
        hours = 1e6 / plan["tokens_per_second"] / 3600
        done = f"{hours * chips * price:,.2f} USD for a million tokens"
    return f"{done} at {price:g} a chip and hour"


def advice(plan: Mapping[str, Any], chips: int) -> str:
    """What to change so that a step fits, the most effective first."""
    state, free = plan["state_bytes"], plan["available_bytes"]
    trains = plan["kind"] == "training"
    group = "train." if trains else ""
    if state > free:
        split = [f"{group}mesh.fsdp", f"{group}mesh.tensor"]
        smaller = "" if trains else ", take int8 weights (--config.int8=True), a shorter context"
        return (
            f"The state alone takes {state / _GIB:.1f} GiB a chip: split it further "
            f"({', '.join(split)}){smaller} or take a larger slice."
        )
    shards = plan["mesh"]["replica"] * plan["mesh"]["fsdp"]
    rows = int(plan["batch_size"] * (free - state) / max(plan["temporary_bytes"], 1))
    rows -= rows % shards
    parts = 2 * plan["accumulate"] if trains else 1
    cut = trains and plan["batch_size"] % (parts * shards) == 0
    remat = plan["remat"] or {}
    towers = {f".{k}": v for k, v in remat.items()} if isinstance(remat, Mapping) else {"": remat}
    kept = [f"--config.remat{k}=full" for k, v in towers.items() if v not in ("full", "offload")]
    ideas: Sequence[str] = [
        *([f"recompute activations ({', '.join(kept)})"] if kept else []),
        *([f"{parts} micro-batches ({group}optim.accumulate)"] if cut else []),
        *([f"a batch of about {rows} rows ({group}batch_size)"] if rows else []),
        *([f"{group}mesh.tensor=2 or more"] if plan["mesh"]["tensor"] < min(chips, 8) else []),
        "a larger slice",
    ]
    return (
        f"Temporaries take {plan['temporary_bytes'] / _GIB:.1f} GiB a chip: {', or '.join(ideas)}."
    )
