"""One training step: a pure function of state and batch, compiled once with explicit shardings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perception_jax.errors import ConfigError
from perception_jax.shard import flops
from perception_jax.shard import mesh as mesh_lib
from perception_jax.train.accumulate import accumulated
from perception_jax.train.config import TrainConfig
from perception_jax.train.deterministic import Apply, Merge
from perception_jax.train.optim import Optimizer
from perception_jax.train.state import AbstractModel, Leaves, TrainState
from perception_jax.train.task import Batch, Metrics, Task

Advance = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
"""Function from state and batch to state and metrics."""

VOTE = "stop_votes"
"""Batch key and metric for the number of devices that ask to stop."""

FINITE_METRICS = ("loss", "grad_norm", "param_norm")
"""Metrics whose non-finite values stop the run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A training step as a plain function, and what it is made of.

    Attributes:
      advance: state and batch to the next state and metrics.
      loss: trainable leaves, frozen leaves, batch and key to the loss and the task's metrics; of
        one micro-batch.
      merge: trainable and frozen leaves to the model in the compute dtype.
      apply: what follows the gradient.
      accumulate: micro-batches of an update. More than one are the first axis of a batch.
    """

    advance: Advance
    loss: Callable[[Leaves, Leaves, Batch, jax.Array], tuple[jax.Array, Metrics]]
    merge: Merge
    apply: Apply
    accumulate: int = 1

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """`advance`."""
        return self.advance(state, batch)

    def model_flops(self, state: TrainState, batch: Batch) -> int:
        """FLOPs that the loss of a (micro-)batch and its gradient need; see `CompiledStep`."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return flops.gradient_flops(self.loss, state.trainable, state.frozen, batch, key)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled step for fixed shapes; it never retraces.

    Attributes:
      call: donates the state that it is given.
      model_flops: of one step, over all devices together: what the loss and its gradient need.
      hardware_flops: what the step computes, recomputation included.
    """

    call: Advance
    model_flops: int
    hardware_flops: int


def make_step(
    task: Task,
    model: AbstractModel,
    optimizer: Optimizer,
    *,
    config: TrainConfig,
    specs: Mapping[str, PartitionSpec] = MappingProxyType({}),
) -> Step:
    """Makes the step of a task: one update.

    Metrics, float32[]: what `task.loss` returns, and "loss", "grad_norm" (before the clip),
    "param_norm" (after the update), "update_ratio" (norm of the update by norm of the parameters)
    and "learning_rate".

    Args:
      specs: how the gradients of several micro-batches are split while they are summed, by path.
    """
    dtype, optim = jnp.dtype(config.compute_dtype), config.optim

    def merge(trainable: Leaves, frozen: Leaves) -> nnx.Module:
        return model.merge(_cast(trainable, dtype), _cast(frozen, dtype))

    def loss(trainable: Leaves, frozen: Leaves, batch: Batch, key: jax.Array):
        return task.loss(merge(trainable, frozen), batch, key)

    gradient = jax.value_and_grad(loss, has_aux=True)
    if optim.accumulate > 1:
        gradient = accumulated(gradient, task, optim.accumulate_mean, specs)

    def apply(
        state: TrainState, value: jax.Array, metrics: Mapping[str, Any], grads: Leaves
    ) -> tuple[TrainState, Metrics]:
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        param_norm = optax.tree.norm(trainable)
        own = {
            "loss": value,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": param_norm,
            "update_ratio": optax.tree.norm(updates) / jnp.maximum(param_norm, 1e-12),
            "learning_rate": optimizer.learning_rate(state.step),
        }
        new = TrainState(
            step=state.step + 1,
            trainable=trainable,
            frozen=state.frozen,
            opt_state=opt_state,
            ema=_average(state.ema, trainable, optim.ema),
            key=state.key,
        )
        return new, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), _union(own, metrics))

    def advance(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        (value, metrics), grads = gradient(state.trainable, state.frozen, batch, key)
        return apply(state, value, metrics, grads)

    return Step(advance=advance, loss=loss, merge=merge, apply=apply, accumulate=optim.accumulate)


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """A step for fixed shapes and a mesh, before it is compiled.

    Attributes:
      lowered: the program.
      model_flops, hardware_flops: see `CompiledStep`.
    """

    lowered: jax.stages.Lowered
    model_flops: int
    hardware_flops: int

    def compile(self) -> CompiledStep:
        """Compiles the step for the devices of its mesh."""
        return CompiledStep(self.lowered.compile(), self.model_flops, self.hardware_flops)


def trace_step(
    step: Step, state: TrainState, shardings: TrainState, batch: Batch, mesh: Mesh
) -> TracedStep:
    """Traces `step` for the shapes of `state` and `batch` (arrays or shapes), the latter as
    `accumulate.in_micro_batches` gives it.

    A batch with the key `VOTE` (int[devices], see `shard.distributed.Ballots`) gets the sum of it
    as a metric of that name.
    """
    several = step.accumulate > 1
    split: Any = mesh_lib.batch_sharding(mesh, axis=int(several))
    examples = {key: batch[key] for key in batch if key != VOTE}
    if several:
        examples = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), examples)
    advance = step.advance
    if VOTE in batch:
        advance = _counting_votes(advance)
        split = {
            **dict.fromkeys(batch, split),
            VOTE: NamedSharding(mesh, PartitionSpec(mesh.axis_names)),
        }
    jitted = jax.jit(
        advance,
        in_shardings=(shardings, split),
        out_shardings=(shardings, mesh_lib.replicated(mesh)),
        donate_argnums=0,
    )
    traced = jitted.trace(state, batch)
    needed = step.model_flops(state, examples)
    computed = flops.count_jaxpr(traced.jaxpr.jaxpr)
    return TracedStep(traced.lower(), model_flops=step.accumulate * needed, hardware_flops=computed)


def compile_step(
    step: Step, state: TrainState, shardings: TrainState, batch: Batch, mesh: Mesh
) -> CompiledStep:
    """Traces and compiles `step`; see `trace_step`."""
    return trace_step(step, state, shardings, batch, mesh).compile()


def _counting_votes(advance: Advance) -> Advance:
    """`advance`, and the sum of `VOTE`: processes agree inside the one program that they all run.

    A program of its own would race the step: on CPU, gloo then pairs the messages of one with those
    of the other.
    """

    def counting(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        votes = batch[VOTE]
        new, metrics = advance(state, {key: batch[key] for key in batch if key != VOTE})
        return new, {**metrics, VOTE: jnp.sum(votes)}

    return counting


def _cast(leaves: Leaves, dtype: jnp.dtype) -> Leaves:
    """Casts floating leaves; integers and keys stay."""
    return {
        path: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for path, leaf in leaves.items()
    }


def _average(average: Leaves | None, new: Leaves, decay: float | None) -> Leaves | None:
    if average is None:
        return None
    return jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p).astype(a.dtype), average, new)


def _union(own: Metrics, task: Any) -> Metrics:
    both = own.keys() & task.keys()
    if both:
        raise ConfigError(
            f"the task's loss returns the metrics {sorted(both)}, which the trainer itself "
            f"reports. Rename them; the trainer's names are {sorted(own)}."
        )
    return {**own, **task}
