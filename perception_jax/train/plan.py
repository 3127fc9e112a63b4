"""What a training step needs on a mesh, from shapes alone; see `shard.plan`."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
from jax.sharding import Mesh

from perception_jax.errors import ConfigError
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import plan, program
from perception_jax.shard.slices import Slice
from perception_jax.train import state_tree
from perception_jax.train.config import TrainConfig
from perception_jax.train.task import Batch, Task
from perception_jax.train.task_step import TaskStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan(plan.ProgramPlan):
    """A compiled training step on a slice.

    Attributes:
      accumulate: micro-batches of a step.
      batch: dtype and shape of the arrays of the global batch, by name.
      trained, frozen: parameters.
      model_flops: of a step without recomputation, see `CompiledStep`.
    """

    accumulate: int
    batch: Mapping[str, str]
    trained: int
    frozen: int
    model_flops: int

    @property
    def mfu_ceiling(self) -> float:
        """Model FLOPs utilisation that a step of `step_seconds` would have."""
        peak = self.hardware_flops / self.compute_seconds
        return self.model_flops / (peak * self.step_seconds)

    def to_json(self) -> dict[str, Any]:
        """All numbers, those of properties among them."""
        return super().to_json() | {"mfu_ceiling": self.mfu_ceiling}


def make_plan(
    task: Task, config: TrainConfig, batch: Batch, found: Slice, devices: Sequence[jax.Device]
) -> StepPlan:
    """Compiles the step that `loop.run` would run, for a slice.

    Args:
      batch: shapes of the global batch, without "id".
      devices: of the slice.

    Raises:
      ConfigError: a mesh that does not fit the slice or the batch, or a deterministic step.
    """
    if config.deterministic:
        raise ConfigError(
            "a deterministic step is many programs, of which each is compiled for one device; "
            "plan it with train.deterministic=False."
        )
    mesh = mesh_lib.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    accumulate = config.optim.accumulate
    mesh_lib.check_batch(mesh, config.batch_size, accumulate=accumulate)
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if rows != {config.batch_size}:
        raise ConfigError(
            f"expected a batch of {config.batch_size} rows (train.batch_size), found {rows}."
        )
    with jax.set_mesh(mesh):
        step = TaskStep.of(task, config, mesh)
        parts = step.in_micro_batches(batch)
        traced = step.trace(parts)
        done = plan.compiled(traced.lowered)
        whole = plan.whole_batch(done, config.batch_size, config.batch_size // accumulate)
        if whole:
            shards = accumulate * mesh_lib.batch_shards(mesh)
            sizes = {size for r in program.results(done.program) for size in r.shape}
            rows = other_rows(config.batch_size, shards, accumulate, sizes)
            if not _whole_with(rows, task, config, batch, mesh):
                whole = []  # another axis has the length of the batch
    state_bytes = plan.shard_bytes(step.state, step.shardings)
    split = mesh_lib.batch_sharding(mesh, axis=int(accumulate > 1))
    arguments = state_bytes + plan.shard_bytes(parts, jax.tree.map(lambda _: split, parts))
    return StepPlan(
        **plan.measured(
            done,
            found,
            mesh,
            arguments=arguments,
            flops=traced.hardware_flops,
            moved=2 * arguments,  # read and written once
        ),
        kind="training",
        batch={
            name: f"{leaf.dtype.name}{list(leaf.shape)}"
            for name, leaf in state_tree.flatten(batch).items()
        },
        batch_size=config.batch_size,
        accumulate=accumulate,
        trained=_count(step.state.trainable),
        frozen=_count(step.state.frozen),
        state_bytes=state_bytes,
        model_flops=traced.model_flops,
        replicated=plan.largest_replicated(
            {**step.state.trainable, **step.state.frozen},
            {**step.shardings.trainable, **step.shardings.frozen},
        ),
        whole=whole,
    )


def other_rows(rows: int, shards: int, accumulate: int, sizes: Set[int]) -> int:
    """The next larger batch that is as long as no axis of a program, whole or in micro-batches.

    Args:
      shards: parts of a batch, of all micro-batches together.
      accumulate: micro-batches.
      sizes: of the axes of the program's arrays.
    """
    larger = itertools.count(shards * (rows // shards + 1), shards)
    return next(n for n in larger if not {n, n // accumulate} & sizes)


def _whole_with(rows: int, task: Task, config: TrainConfig, batch: Batch, mesh: Mesh) -> bool:
    """Whether a batch of another length is whole somewhere as well."""
    accumulate = config.optim.accumulate
    other = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)
    config = dataclasses.replace(config, batch_size=rows)
    step = TaskStep.of(task, config, mesh)
    done = plan.compiled(step.trace(step.in_micro_batches(other)).lowered)
    return done.program is None or bool(plan.whole_batch(done, rows, rows // accumulate))


def _count(leaves: Mapping[str, Any]) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves.values())
