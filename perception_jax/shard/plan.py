"""What a program needs on a mesh, from shapes alone: memory, FLOPs, traffic.

Nothing runs and no array is made, so that the mesh may be that of a TPU slice that is not there
(`shard.slices`). Plans of training and of serving are subclasses of `ProgramPlan`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from perception_jax.shard import program, traffic
from perception_jax.shard.slices import Slice

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT])")
_SHOWN = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramPlan:
    """A program compiled for a slice. Bytes are those of one chip, FLOPs of all together.

    Attributes:
      kind: of the step.
      slice: name of the slice.
      mesh: sizes of the mesh's axes.
      batch_size: rows of the global batch.
      state_bytes: weights and what else stays on the chip from step to step.
      argument_bytes: of all arrays that the program is given.
      temporary_bytes: intermediate arrays and copies; what the compiler reports.
      host_bytes: intermediate arrays in the host's memory, for each chip.
      total_bytes: of the program; None where it did not fit and the compiler gave no total.
      available_bytes: memory of a chip.
      fits: whether the compiler placed the program.
      hardware_flops: that the program computes.
      collective_bytes: sent by a chip inside its slice, by kind of collective; None where there is
        no program, since the compiler refused it, or it cannot be read (`program.text`). Then
        `whole` is empty, which says nothing.
      dcn_bytes: sent by a chip to other slices.
      collectives: the largest of them, for reading.
      replicated: path and bytes of the largest leaf of which every chip holds all.
      whole: arrays on one chip that should be split: rows of the global batch, and others that the
        kind of plan names.
      compute_seconds: hardware FLOPs at the chips' peak.
      memory_seconds: what has to be read and written at the memory's peak: a lower bound.
      communication_seconds: collectives at the peak of the interconnect or, if that takes longer,
        of the network between slices; None like `collective_bytes`.
      compile_seconds: of this plan.
    """

    kind: Literal["training", "prefill", "decode"]
    slice: str
    mesh: Mapping[str, int]
    batch_size: int
    state_bytes: int
    argument_bytes: int
    temporary_bytes: int
    host_bytes: int
    total_bytes: int | None
    available_bytes: int
    fits: bool
    hardware_flops: int
    collective_bytes: Mapping[str, int] | None
    dcn_bytes: int
    collectives: Sequence[str]
    replicated: tuple[str, int]
    whole: Sequence[str]
    compute_seconds: float
    memory_seconds: float
    communication_seconds: float | None
    compile_seconds: float

    @property
    def step_seconds(self) -> float:
        """Roofline of a step: the slowest of the three, as if they overlapped completely.

        Communication that is unknown is left out.
        """
        return max(self.compute_seconds, self.memory_seconds, self.communication_seconds or 0.0)

    def to_json(self) -> dict[str, Any]:
        """All numbers, those of properties among them."""
        return dataclasses.asdict(self) | {"step_seconds": self.step_seconds}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled program, or how much memory one would need that the compiler refused.

    Attributes:
      program: None if it was refused.
      required: bytes that a refused program needs, else 0.
      seconds: of the compilation.
    """

    program: jax.stages.Compiled | None
    required: int
    seconds: float


def compiled(lowered: jax.stages.Lowered) -> Compiled:
    """Compiles a program for the devices of its mesh."""
    start = time.perf_counter()
    try:
        found, required = lowered.compile(), 0
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        size = _SIZE.search(message)
        if "RESOURCE_EXHAUSTED" not in message or size is None:
            raise
        found, required = None, int(float(size[1]) * _UNITS[size[2]])
    return Compiled(program=found, required=required, seconds=time.perf_counter() - start)


def measured(
    done: Compiled, found: Slice, mesh: Mesh, *, arguments: int, flops: int, moved: int
) -> dict[str, Any]:
    """The fields of a `ProgramPlan` that follow from its program.

    Args:
      arguments: bytes of the arrays that it is given, for a program that was refused.
      flops: that it computes, all chips together.
      moved: bytes of a chip's memory that it has to read or write.
    """
    chips = mesh.size // found.slices
    text = "" if done.program is None else program.text(done.program)
    sent = traffic.parse(text, chips, found.slices) if text else []
    memory = None if done.program is None else done.program.memory_analysis()
    if memory is None:
        temporary, host, total = done.required, 0, None
    else:
        arguments = memory.argument_size_in_bytes
        temporary, host = memory.temp_size_in_bytes, memory.host_temp_size_in_bytes
        kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
        total = arguments + temporary + kept + memory.generated_code_size_in_bytes
    return {
        "slice": found.name,
        "mesh": dict(mesh.shape),
        "argument_bytes": arguments,
        "temporary_bytes": temporary,
        "host_bytes": host,
        "total_bytes": total,
        "available_bytes": found.hbm,
        "fits": total is not None and total <= found.hbm,
        "hardware_flops": flops,
        "collective_bytes": traffic.by_kind(sent) if text else None,
        "dcn_bytes": sum(item.dcn_bytes for item in sent),
        "collectives": [_described(item) for item in sent[:_SHOWN]],
        "compute_seconds": flops / (mesh.size * found.flops),
        "memory_seconds": moved / found.hbm_bandwidth,
        "communication_seconds": max(
            sum(item.bytes for item in sent) / found.ici_bandwidth,
            sum(item.dcn_bytes for item in sent) / found.dcn_bandwidth,
        )
        if text
        else None,
        "compile_seconds": done.seconds,
    }


def whole_batch(done: Compiled, *rows: int) -> list[str]:
    """Arrays on one chip that hold the global batch or a global micro-batch: of three or more axes
    of which one is as long, or of two as long, such as the similarities of all pairs."""
    if done.program is None:
        return []
    found = set(program.results(done.program))
    pairs = {(count, count) for count in rows}
    return listed(
        r for r in found if (len(r.shape) >= 3 and set(rows) & set(r.shape)) or r.shape in pairs
    )


def listed(results: Any) -> list[str]:
    """Operations, dtypes and shapes of `program.Result`s, for reading."""
    return sorted({f"{r.operation} {r.dtype}{list(r.shape)}" for r in results})


def shard_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a pytree of shapes on one device."""

    def size(leaf: Any, sharding: jax.sharding.Sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))


def largest_replicated(
    leaves: Mapping[str, Any], shardings: Mapping[str, jax.sharding.Sharding]
) -> tuple[str, int]:
    """Path and bytes of the largest leaf that is whole on every device; ("", 0) if none is."""
    sizes = {
        path: math.prod(leaf.shape) * leaf.dtype.itemsize
        for path, leaf in leaves.items()
        if shardings[path].is_fully_replicated
    }
    return max(sizes.items(), key=lambda item: item[1], default=("", 0))


def _described(item: traffic.Traffic) -> str:
    shape = ",".join(map(str, item.result.shape))
    return (
        f"{item.kind} {item.result.dtype}[{shape}] over {item.group}, {item.times} times: "
        f"{item.bytes / 1e6:.1f} MB"
        + (f" and {item.dcn_bytes / 1e6:.1f} MB to other slices" if item.dcn_bytes else "")
    )
