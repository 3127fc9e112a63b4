"""The gradient of one update with the same bits on any number of devices.

Floating-point sums depend on their order, and compiled programs on the shapes that they work on. So
the rows of an update are cut into a fixed number of parts, whatever the number of devices; each
part is computed by the same program with the same shapes, and the parts' gradients are summed as a
fixed binary tree: neighbours first, within a device and then between devices. On several hosts the
rows of a part depend on how many hosts there are.

- A task with a mean of rows (`train.task.MeanLoss`) gives each part's gradient.
- A task whose loss compares rows gives `train.task.FeatureLoss`: features of each part, gathered;
  the loss and its gradient by the features, on every device the whole of it; then the gradient of
  each part's features (as in GradCache, arXiv 2101.06983). The forward pass runs twice.

Weights and optimizer state are whole on each device, and all devices do the same update. What it
costs is in `docs/scale.md`.

Letters: B rows of an update, S parts, s of them on a device, b rows of a part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, PRNGKeyArray

from perception_jax.errors import ConfigError
from perception_jax.ops.sharding import AXES, BATCH_AXES, TENSOR
from perception_jax.shard import mesh as mesh_lib
from perception_jax.train.accumulate import TOKENS, Gradient, tokens_of
from perception_jax.train.state import Leaves
from perception_jax.train.task import Batch, FeatureLoss, MeanLoss, Metrics, Task

Merge = Callable[[Leaves, Leaves], nnx.Module]
"""Trainable and frozen leaves to the module in the compute dtype."""


def check(mesh: Mesh, parts: int) -> None:
    """Raises an error if a mesh cannot compute in that many parts.

    Raises:
      ConfigError: layers that are split, or devices that do not get the same even number of parts.
    """
    shards = mesh_lib.batch_shards(mesh)
    if mesh.shape[TENSOR] > 1:
        raise ConfigError(
            f"deterministic: expected mesh.tensor=1, found {mesh.shape[TENSOR]}: products that are "
            "split over devices are summed in another order than on one."
        )
    if parts & (parts - 1) or shards & (shards - 1) or parts < 2 * shards:
        raise ConfigError(
            f"deterministic: expected powers of 2 and at least two parts on each device, found "
            f"deterministic_parts={parts} and {shards} devices. Set deterministic_parts to "
            f"{2 ** math.ceil(math.log2(2 * shards))}, for all runs that are to be equal."
        )


def deterministic(gradient: Gradient, merge: Merge, task: Task, parts: int) -> Gradient:
    """The gradient of a batch in a number of parts that does not depend on the mesh.

    Part m gets the key with m folded in. Metrics are means over parts, as the loss.

    Args:
      gradient: of one part, for a `MeanLoss`.
      merge: for a `FeatureLoss`.
      parts: S, a power of 2.

    Raises:
      ConfigError: the task is neither.
    """
    if isinstance(task, MeanLoss):
        local = functools.partial(_of_means, gradient, task.mean_over == TOKENS)
    elif isinstance(task, FeatureLoss):
        local = functools.partial(_of_features, merge, task)
    else:
        raise ConfigError(
            f"deterministic: {type(task).__name__} has neither a loss that is a mean over rows "
            "(`train.task.MeanLoss`) nor one over features (`FeatureLoss`)."
        )

    def update(trainable: Leaves, frozen: Leaves, batch: Batch, key: PRNGKeyArray) -> Any:
        whole, split = PartitionSpec(), PartitionSpec(BATCH_AXES)
        on_device = jax.shard_map(
            local,
            in_specs=(whole, whole, split, whole, split),
            out_specs=whole,
            axis_names=set(AXES),
            check_vma=False,  # the compiler cannot see that the ordered sums are equal
        )
        given = (trainable, frozen, batch, key, jnp.arange(parts))
        # What is around must not be fused with the parts: it is not the same on every mesh.
        return jax.lax.optimization_barrier(on_device(*jax.lax.optimization_barrier(given)))

    return update


def _of_means(
    gradient: Gradient,
    by_tokens: bool,
    trainable: Leaves,
    frozen: Leaves,
    batch: Batch,
    key: PRNGKeyArray,
    numbers: Int[Array, " s"],
) -> Any:
    def part(number: Int[Array, ""], rows: Batch) -> Any:
        own = jax.random.fold_in(key, number)
        (value, metrics), grads = gradient(trainable, frozen, rows, own)
        weight = tokens_of(metrics) if by_tokens else jnp.float32(1)
        means = ((value, {k: x for k, x in metrics.items() if k != TOKENS}), grads)
        sums = {k: x for k, x in metrics.items() if k == TOKENS}
        return jax.tree.map(lambda x: weight * x, means), sums, weight

    means, sums, weight = _ordered_sum(part, numbers, _cut(batch, numbers))
    (value, metrics), grads = jax.tree.map(lambda x: x / jnp.maximum(weight, 1), means)
    return (value, {**metrics, **sums}), grads


def _of_features(
    merge: Merge,
    task: FeatureLoss,
    trainable: Leaves,
    frozen: Leaves,
    batch: Batch,
    key: PRNGKeyArray,
    numbers: Int[Array, " s"],
) -> Any:
    def features(trainable: Leaves, number: Int[Array, ""], rows: Batch) -> Any:
        own = jax.random.fold_in(key, number)
        return task.features(merge(trainable, frozen), rows, own)

    def loss(trainable: Leaves, found: Any) -> tuple[Array, Metrics]:
        return task.loss_of(merge(trainable, frozen), found)

    batch = _cut(batch, numbers)
    local = _each(functools.partial(features, trainable), numbers, batch)
    whole = jax.lax.all_gather(local, BATCH_AXES, tiled=True)  # [S, b, ...]
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), whole)
    floating, others = _floating(rows)

    def of_floating(trainable: Leaves, floating: list[Array]) -> tuple[Array, Metrics]:
        return loss(trainable, _joined(rows, floating, others))

    wanted = jax.value_and_grad(of_floating, argnums=(0, 1), has_aux=True)
    found, (direct, by_rows) = jax.lax.optimization_barrier(wanted(trainable, floating))
    cotangents = [
        jax.lax.dynamic_slice_in_dim(x.reshape(-1, *own.shape[1:]), numbers[0], len(numbers))
        for x, own in zip(by_rows, _floating(local)[0], strict=True)
    ]

    def part(number: Int[Array, ""], given: tuple[Batch, list[Array]]) -> Leaves:
        rows, cotangent = given

        def own(trainable: Leaves) -> list[Array]:
            return _floating(features(trainable, number, rows))[0]

        return jax.vjp(own, trainable)[1](cotangent)[0]

    grads = _ordered_sum(part, numbers, (batch, cotangents))
    return found, jax.tree.map(jnp.add, direct, grads)


def _floating(tree: Any) -> tuple[list[Array], list[Array]]:
    """The floating leaves, and the others."""
    leaves = jax.tree.leaves(tree)
    floats = [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]
    return floats, [x for x in leaves if not jnp.issubdtype(x.dtype, jnp.floating)]


def _joined(like: Any, floating: list[Array], others: list[Array]) -> Any:
    """Undoes `_floating`."""
    leaves, structure = jax.tree.flatten(like)
    own, rest = iter(floating), iter(others)
    return structure.unflatten(
        next(own) if jnp.issubdtype(x.dtype, jnp.floating) else next(rest) for x in leaves
    )


def _cut(batch: Batch, numbers: Int[Array, " s"]) -> Batch:
    """The rows of this device as `[s, b, ...]`."""
    return jax.tree.map(lambda x: x.reshape(len(numbers), -1, *x.shape[1:]), batch)


def _each(part: Callable[..., Any], numbers: Int[Array, " s"], parts: Any) -> Any:
    """`part(number, rows)` for the parts of this device in turn; results have the axis s first."""
    return jax.lax.map(lambda given: _alone(part, *given), (numbers, parts))


def _ordered_sum(part: Callable[..., Any], numbers: Int[Array, " s"], parts: Any) -> Any:
    """The sum of `part(number, rows)` over the parts of all devices, as a fixed binary tree."""

    def halves(x: Array) -> Array:
        return x.reshape(2, -1, *x.shape[1:])

    def tree(given: Any) -> Any:
        if len(given[0]) == 1:
            return _alone(part, *jax.tree.map(lambda x: x[0], given))
        both = jax.lax.map(tree, jax.tree.map(halves, given))
        return jax.tree.map(lambda x: x[0] + x[1], both)

    return _between_devices(tree((numbers, parts)))


def _between_devices(own: Any) -> Any:
    """Sums over all devices: at each of log2(n) levels a device exchanges its sum with one other.
    Addition commutes, so that both get the same bits."""
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    step = 1
    while step < devices:
        pairs = [(device, device ^ step) for device in range(devices)]
        other = jax.tree.map(lambda x, p=pairs: jax.lax.ppermute(x, BATCH_AXES, p), own)
        own = jax.tree.map(jnp.add, own, other)
        step *= 2
    return own


def _alone(part: Callable[..., Any], number: Int[Array, ""], rows: Any) -> Any:
    """One part, which the compiler must not fuse with anything else."""
    given = jax.lax.optimization_barrier((number, rows))
    return jax.lax.optimization_barrier(part(*given))
