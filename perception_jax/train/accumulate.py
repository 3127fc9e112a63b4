"""The gradient of one update as the mean over micro-batches, by a loop inside the step.

A batch `[B, …]` becomes `[A, B / A, …]` on the host: micro-batch m is the m-th run of consecutive
rows in the order of the data, whatever the mesh and the number of hosts, so that groups of rows
stay together. On the devices the rows of each micro-batch are split over the batch axes.

- Memory holds the activations of one micro-batch and a float32 sum of the gradients, which lies
  where the parameters lie.
- "fsdp": each micro-batch gathers the weights and scatters its gradients. That is what keeps the
  sum split; one reduction after the loop would need all gradients whole on every chip.
- "replica": copies are summed once, after the loop, if the task's loss is a mean whose parts can
  be computed apart (`train.task.MeanLoss`). Losses that compare rows with each other are reduced
  in each micro-batch, and see the rows of that micro-batch alone.

Letters: B rows of an update, A micro-batches, R copies of the model (the axis "replica").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray

from perception_jax.errors import ConfigError
from perception_jax.ops.sharding import REPLICA, constrain_batch, constrain_to
from perception_jax.train.state import Leaves
from perception_jax.train.task import Batch, MeanLoss, Metrics, Task

TOKENS = "tokens"
"""Metric by which micro-batches are weighted; the sum over all of them is what is reported."""

Gradient = Callable[[Leaves, Leaves, Batch, jax.Array], tuple[tuple[jax.Array, Metrics], Leaves]]
"""Trainable and frozen leaves, batch and key to ((loss, metrics), gradients)."""

Tree = TypeVar("Tree")
"""Type of a pytree."""


def in_micro_batches(batch: Tree, accumulate: int) -> Tree:
    """Cuts the leading axis of arrays, `[B, …]`, into `[A, B / A, …]`; 1 leaves them unchanged."""
    if accumulate == 1:
        return batch
    return jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)


def accumulated(
    gradient: Gradient,
    task: Task,
    mean: Literal["equal", "tokens"],
    specs: Mapping[str, PartitionSpec],
) -> Gradient:
    """The mean of `gradient` over the micro-batches of a batch `[A, B / A, …]`.

    Micro-batch m gets the key with m folded in. Metrics are means with the weights of the
    gradients, except "tokens", which is summed.

    Args:
      gradient: of one micro-batch.
      task: tells whether its loss can be computed apart on each copy of the model.
      mean: "equal" weights each micro-batch the same, "tokens" by the metric of that name.
      specs: how the gradients are split while they are summed, by path; others are left to the
        compiler.

    Raises:
      ConfigError: when traced: "tokens" are needed, and the task's loss returns no such metric.
    """
    over = task.mean_over if isinstance(task, MeanLoss) else None

    def update(trainable: Leaves, frozen: Leaves, batch: Batch, key: PRNGKeyArray) -> Any:
        copies = jax.sharding.get_abstract_mesh().shape.get(REPLICA, 1)
        if over is None or copies == 1:
            return summed(trainable, frozen, batch, key)

        def on_copy(
            trainable: Leaves,
            frozen: Leaves,
            batch: Batch,
            key: PRNGKeyArray,
            copy: Int[Array, "1"],
        ) -> Any:
            return summed(trainable, frozen, batch, jax.random.fold_in(key, copy[0]), copies)

        same, rows = PartitionSpec(), PartitionSpec(None, REPLICA)
        return jax.shard_map(
            on_copy,
            in_specs=(same, same, rows, same, PartitionSpec(REPLICA)),
            out_specs=same,
            axis_names={REPLICA},
            check_vma=False,  # else every use of a parameter would be reduced where it is
        )(trainable, frozen, batch, key, jnp.arange(copies))

    def summed(
        trainable: Leaves, frozen: Leaves, batch: Batch, key: PRNGKeyArray, copies: int = 1
    ) -> Any:
        def total(x: Any) -> Any:
            return x if copies == 1 else jax.lax.psum(x, REPLICA)

        def add(sums: Leaves, micro: tuple[Array, Batch]) -> Any:
            index, rows = micro
            (value, metrics), grads = gradient(
                trainable, frozen, constrain_batch(rows), jax.random.fold_in(key, index)
            )
            weight, share = jnp.float32(1), jnp.float32(1 / copies)
            if mean == TOKENS or over == TOKENS:
                own = tokens_of(metrics)
                tokens = total(own)
                weight = tokens if mean == TOKENS else weight
                share = own / jnp.maximum(tokens, 1) if over == TOKENS else share
            scale = weight * share
            sums = {path: _add(sums[path], scale * grads[path], path) for path in sums}
            return sums, (value, metrics, scale, weight)

        def _add(a: Array, b: Array, path: str) -> Array:
            return constrain_to(a + b, specs[path]) if path in specs else a + b

        zeros = {path: jnp.zeros(leaf.shape, jnp.float32) for path, leaf in trainable.items()}
        count = len(jax.tree.leaves(batch)[0])
        sums, (values, metrics, scales, weights) = jax.lax.scan(
            add, zeros, (jnp.arange(count), batch)
        )
        whole = jnp.maximum(jnp.sum(weights), jnp.finfo(jnp.float32).tiny)

        def averaged(values: Array) -> Array:
            return total(jnp.sum(scales * values)) / whole

        found = {name: averaged(value) for name, value in metrics.items() if name != TOKENS}
        if TOKENS in metrics:
            found[TOKENS] = total(jnp.sum(metrics[TOKENS], dtype=jnp.float32))
        grads = jax.tree.map(lambda leaf: leaf / whole, total(sums))
        return (averaged(values), found), grads

    return update


def tokens_of(metrics: Metrics) -> Array:
    """The metric "tokens", float32[]; raises a ConfigError if there is none."""
    if TOKENS not in metrics:
        raise ConfigError(
            f"micro-batches are weighted by the metric {TOKENS!r}, but the task's loss returns "
            f"{sorted(metrics) or 'no metrics'}. Set optim.accumulate_mean='equal', or return the "
            "number of predicted tokens."
        )
    return metrics[TOKENS].astype(jnp.float32)
