"""What a training step needs on a mesh, from shapes alone: memory, FLOPs, traffic.

Nothing runs and no array is made, so that the mesh may be that of a TPU slice that is not there
(`shard.slices`).
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from perception_jax.errors import ConfigError
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import program, traffic
from perception_jax.shard.slices import Slice
from perception_jax.train.config import TrainConfig
from perception_jax.train.state import TrainState
from perception_jax.train.step import TracedStep
from perception_jax.train.task import Batch, Task
from perception_jax.train.task_step import TaskStep

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT])")
_SHOWN = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """A compiled training step on a slice. Bytes are those of one chip, FLOPs of all together.

    Attributes:
      slice: name of the slice.
      mesh: sizes of the mesh's axes.
      batch_size: rows of the global batch.
      trained, frozen: parameters.
      state_bytes: parameters, optimizer state and the like.
      argument_bytes: the state and the batch.
      temporary_bytes: activations, gradients and copies; what the compiler reports.
      total_bytes: of the program; None where it did not fit and the compiler gave no total.
      available_bytes: memory of a chip.
      fits: whether the compiler placed the program.
      model_flops, hardware_flops: of a step, see `CompiledStep`.
      collective_bytes: sent in a step, by kind of collective.
      collectives: the largest of them, for reading.
      replicated: path and bytes of the largest leaf of which every chip holds all.
      whole_batch: arrays of three or more axes that hold the rows of the global batch.
      compute_seconds: hardware FLOPs at the chips' peak.
      memory_seconds: state and batch read and written once at the memory's peak: a lower bound.
      communication_seconds: collectives at the interconnect's peak.
      compile_seconds: of this plan.
    """

    slice: str
    mesh: Mapping[str, int]
    batch_size: int
    trained: int
    frozen: int
    state_bytes: int
    argument_bytes: int
    temporary_bytes: int
    total_bytes: int | None
    available_bytes: int
    fits: bool
    model_flops: int
    hardware_flops: int
    collective_bytes: Mapping[str, int]
    collectives: Sequence[str]
    replicated: tuple[str, int]
    whole_batch: Sequence[str]
    compute_seconds: float
    memory_seconds: float
    communication_seconds: float
    compile_seconds: float

    @property
    def step_seconds(self) -> float:
        """Roofline of a step: the slowest of the three, as if they overlapped completely."""
        return max(self.compute_seconds, self.memory_seconds, self.communication_seconds)

    @property
    def mfu_ceiling(self) -> float:
        """Model FLOPs utilisation that a step of `step_seconds` would have."""
        peak = self.hardware_flops / self.compute_seconds
        return self.model_flops / (peak * self.step_seconds)

    def to_json(self) -> dict[str, Any]:
        """All numbers, those of properties among them."""
        derived = {"step_seconds": self.step_seconds, "mfu_ceiling": self.mfu_ceiling}
        return dataclasses.asdict(self) | derived


def make_plan(
    task: Task, config: TrainConfig, batch: Batch, found: Slice, devices: Sequence[jax.Device]
) -> StepPlan:
    """Compiles the step that `loop.run` would run, for a slice.

    Args:
      batch: shapes of the global batch, without "id".
      devices: of the slice.

    Raises:
      ConfigError: a mesh that does not fit the slice or the batch.
    """
    mesh = mesh_lib.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    mesh_lib.check_batch(mesh, config.batch_size)
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if rows != {config.batch_size}:
        raise ConfigError(
            f"expected a batch of {config.batch_size} rows (train.batch_size), found {rows}."
        )
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        step = TaskStep.of(task, config, mesh)
        traced = step.trace(batch)
        compiled, failure = _compile(traced)
        whole = [] if compiled is None else _whole_batch(compiled, config.batch_size)
        if whole and not _with_other_rows(task, config, batch, mesh):
            whole = []  # another axis has the length of the batch
    state_bytes = _shard_bytes(step.state, step.shardings)
    split = mesh_lib.batch_sharding(mesh)
    batch_bytes = _shard_bytes(batch, jax.tree.map(lambda _: split, batch))
    sent = [] if compiled is None else traffic.traffic(compiled, mesh.size)
    memory = None if compiled is None else compiled.memory_analysis()
    arguments = state_bytes + batch_bytes
    if memory is None:
        temporary, total = failure.required, None
    else:
        arguments = memory.argument_size_in_bytes
        temporary = memory.temp_size_in_bytes
        kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
        total = arguments + temporary + kept + memory.generated_code_size_in_bytes
    return StepPlan(
        slice=found.name,
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        trained=_count(step.state.trainable),
        frozen=_count(step.state.frozen),
        state_bytes=state_bytes,
        argument_bytes=arguments,
        temporary_bytes=temporary,
        total_bytes=total,
        available_bytes=found.hbm,
        fits=compiled is not None and total <= found.hbm,
        model_flops=traced.model_flops,
        hardware_flops=traced.hardware_flops,
        collective_bytes=traffic.by_kind(sent),
        collectives=[_described(item) for item in sent[:_SHOWN]],
        replicated=_largest_replicated(step.state, step.shardings),
        whole_batch=whole,
        compute_seconds=traced.hardware_flops / (mesh.size * found.flops),
        memory_seconds=2 * arguments / found.hbm_bandwidth,
        communication_seconds=sum(item.bytes for item in sent) / found.ici_bandwidth,
        compile_seconds=time.perf_counter() - start,
    )


@dataclasses.dataclass(frozen=True)
class _OutOfMemory:
    """Bytes that a program needs which the compiler refused."""

    required: int


def _compile(traced: TracedStep) -> tuple[jax.stages.Compiled | None, _OutOfMemory | None]:
    """The program, or how much memory it would need."""
    try:
        return traced.compile().call, None
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        size = _SIZE.search(message)
        if "RESOURCE_EXHAUSTED" not in message or size is None:
            raise
        return None, _OutOfMemory(int(float(size[1]) * _UNITS[size[2]]))


def _whole_batch(compiled: jax.stages.Compiled, rows: int) -> list[str]:
    found = set(program.results(compiled))
    held = [r for r in found if len(r.shape) >= 3 and rows in r.shape]
    return sorted(f"{r.operation} {r.dtype}{list(r.shape)}" for r in held)


def _with_other_rows(task: Task, config: TrainConfig, batch: Batch, mesh: Mesh) -> bool:
    """Whether a batch of another length is whole somewhere as well."""
    rows = config.batch_size + 3 * mesh_lib.batch_shards(mesh)
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    config = dataclasses.replace(config, batch_size=rows)
    compiled, _ = _compile(TaskStep.of(task, config, mesh).trace(other))
    return compiled is None or bool(_whole_batch(compiled, rows))


def _shard_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a pytree of shapes on one device."""

    def size(leaf: Any, sharding: jax.sharding.Sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))


def _largest_replicated(state: TrainState, shardings: TrainState) -> tuple[str, int]:
    sizes = {
        path: math.prod(leaf.shape) * leaf.dtype.itemsize
        for leaves, placed in (
            (state.trainable, shardings.trainable),
            (state.frozen, shardings.frozen),
        )
        for path, leaf in leaves.items()
        if placed[path].is_fully_replicated
    }
    return max(sizes.items(), key=lambda item: item[1], default=("", 0))


def _count(leaves: Mapping[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def _described(item: traffic.Traffic) -> str:
    shape = ",".join(map(str, item.result.shape))
    return (
        f"{item.kind} {item.result.dtype}[{shape}] over {item.group}, {item.times} times: "
        f"{item.bytes / 1e6:.1f} MB"
    )
