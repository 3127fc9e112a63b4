"""The training step of a task on a mesh, put together from shapes alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import optax
from jax.sharding import Mesh, PartitionSpec

from perception_jax.train.accumulate import in_micro_batches
from perception_jax.train.config import TrainConfig
from perception_jax.train.deterministic import DeterministicStep, check
from perception_jax.train.optim import make_optimizer
from perception_jax.train.state import (
    AbstractModel,
    TrainState,
    abstract_model,
    abstract_state,
    init_state,
    state_shardings,
)
from perception_jax.train.step import (
    VOTE,
    CompiledStep,
    Step,
    TracedStep,
    make_step,
    trace_step,
)
from perception_jax.train.task import Batch, DeclaresShapes, Metrics, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskStep:
    """A training step before it is compiled; `model` and `state` have shapes for leaves."""

    task: Task
    config: TrainConfig
    mesh: Mesh
    model: AbstractModel
    optimizer: optax.GradientTransformation
    state: TrainState
    shardings: TrainState
    step: Step

    @classmethod
    def of(cls, task: Task, config: TrainConfig, mesh: Mesh) -> TaskStep:
        """Puts model, optimizer, shardings and step together."""
        model = abstract_model(task, config.frozen_dtype, config.optim.rules)
        optimizer = make_optimizer(config.optim, config.steps, model.trainable)
        state = abstract_state(model, optimizer.transform, ema=config.optim.ema is not None)
        rules = task.shardings
        if config.deterministic:
            check(mesh, config.deterministic_parts, task)
            rules = ((".*", PartitionSpec()),)
        shardings = state_shardings(state, rules, mesh)
        specs = {path: sharding.spec for path, sharding in shardings.trainable.items()}
        return cls(
            task=task,
            config=config,
            mesh=mesh,
            model=model,
            optimizer=optimizer.transform,
            state=state,
            shardings=shardings,
            step=make_step(task, model, optimizer, config=config, specs=specs),
        )

    def init(self) -> TrainState:
        """The state of a new run, initialised or loaded in shards."""
        seed, dtype = self.config.seed, self.config.frozen_dtype
        return init_state(self.task, self.optimizer, self.shardings, seed, dtype)

    @property
    def batch_shapes(self) -> Sequence[Batch]:
        """The shapes that the task declares; () if the first batch decides."""
        return self.task.batch_shapes() if isinstance(self.task, DeclaresShapes) else ()

    def in_micro_batches(self, batch: Batch) -> Batch:
        """The shapes of a batch as the step gets it."""
        accumulate = self.config.optim.accumulate
        return jax.eval_shape(lambda batch: in_micro_batches(batch, accumulate), batch)

    def trace(self, batch: Batch) -> TracedStep:
        """Traces the step for a batch of arrays or shapes, in micro-batches if there are any."""
        return trace_step(self.step, self.state, self.shardings, batch, self.mesh)

    def compile(self, batch: Batch) -> CompiledStep:
        """Compiles the step for a batch of arrays or shapes; the programs of a deterministic step
        are compiled when it is first called."""
        if not self.config.deterministic:
            return self.trace(batch).compile()
        rows = {key: x for key, x in batch.items() if key != VOTE}
        step = self._deterministic

        def call(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            rows = {key: x for key, x in batch.items() if key != VOTE}
            state, metrics, votes = step(state, rows, batch.get(VOTE))
            return state, metrics if votes is None else {**metrics, VOTE: votes}

        return CompiledStep(
            call, self.step.model_flops(self.state, rows), step.hardware_flops(self.state, rows)
        )

    @functools.cached_property
    def _deterministic(self) -> DeterministicStep:
        """One for all shapes of batches, so that the update is compiled for the first only."""
        parts = self.config.deterministic_parts
        return DeterministicStep(self.task, parts, self.mesh, self.step.merge, self.step.apply)
