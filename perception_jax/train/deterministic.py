"""A training step with the same bits on any number of devices.

Floating-point sums depend on their order, and what a compiler makes of a program on how many
devices it compiles for. So every program that computes here is compiled for one device, and works
on shapes that do not depend on their number; between these programs data only move:

1. The rows of an update are cut into a fixed number of parts. Each device computes the gradients of
   its parts, one after another, by the same program.
2. Gradients are summed as a fixed binary tree: neighbours first, on a device and then over devices.
3. Each device does the whole update. Weights and optimizer state are whole on all of them.

A task whose loss is a mean of rows (`train.task.MeanLoss`) gives the gradient of a part. One whose
loss compares rows gives `train.task.FeatureLoss`: features of each part; the loss and its gradient
by the features of all rows, on each device; then the gradient of each part's features (as in
GradCache, arXiv 2101.06983), so that the forward pass runs twice.

What it costs is in `docs/scale.md`. On several hosts the rows of a part depend on how many hosts
there are, as hosts take the rows of the data in turn.

Letters: B rows of an update, S parts, n devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from perception_jax.errors import ConfigError
from perception_jax.ops.sharding import TENSOR
from perception_jax.shard import flops
from perception_jax.shard import mesh as mesh_lib
from perception_jax.train.accumulate import TOKENS, tokens_of
from perception_jax.train.state import Leaves, TrainState
from perception_jax.train.task import Batch, FeatureLoss, MeanLoss, Metrics, Task

Merge = Callable[[Leaves, Leaves], nnx.Module]
"""Trainable and frozen leaves to the module in the compute dtype."""
Apply = Callable[[TrainState, jax.Array, Mapping[str, Any], Leaves], tuple[TrainState, Metrics]]
"""State, loss, the task's metrics and gradients to the next state and all metrics."""


def check(mesh: Mesh, parts: int, task: Task) -> None:
    """Raises an error if a task or a mesh cannot compute in that many parts.

    Raises:
      ConfigError: a task that is neither a `MeanLoss` nor a `FeatureLoss`, layers that are split,
        or numbers that are no powers of 2.
    """
    if not isinstance(task, MeanLoss | FeatureLoss):
        raise ConfigError(
            f"deterministic: {type(task).__name__} has neither a loss that is a mean over rows "
            "(`train.task.MeanLoss`) nor one over features (`FeatureLoss`)."
        )
    devices = mesh_lib.batch_shards(mesh)
    if mesh.shape[TENSOR] > 1:
        raise ConfigError(
            f"deterministic: expected mesh.tensor=1, found {mesh.shape[TENSOR]}: products that are "
            "split over devices are summed in another order than on one."
        )
    if parts & (parts - 1) or devices & (devices - 1) or parts < devices:
        raise ConfigError(
            f"deterministic: expected powers of 2 and a part for each device, found "
            f"deterministic_parts={parts} and {devices} devices. Set deterministic_parts to "
            f"{2 ** math.ceil(math.log2(devices))}, for all runs that are to be equal."
        )


class DeterministicStep:
    """The step of a task in programs of one device each.

    Args:
      task, parts, mesh: see `check`.
      merge: leaves to the model.
      apply: what follows the gradient.
    """

    def __init__(self, task: Task, parts: int, mesh: Mesh, merge: Merge, apply: Apply):
        check(mesh, parts, task)
        self._task, self._parts, self._mesh = task, parts, mesh
        self._devices = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
        self._alone = [mesh_lib.make_mesh(devices=[device]) for device in self._devices]
        self._whole = mesh_lib.replicated(mesh)
        self._gather = jax.jit(
            lambda stacked, votes: (stacked, jax.tree.map(jnp.sum, votes)),
            out_shardings=self._whole,
        )
        self._merge = merge
        self._of_part = jax.jit(self._mean_of_part)
        self._features = jax.jit(self._features_of_part)
        self._of_features = jax.jit(self._loss_of_features)
        self._back = jax.jit(self._gradient_of_part)
        self._mean = jax.jit(_divided)
        self._apply = jax.jit(apply)

    def __call__(
        self, state: TrainState, batch: Batch, votes: Array | None = None
    ) -> tuple[TrainState, Metrics, Array | None]:
        """The next state, metrics, and the sum of votes.

        Args:
          state: whole on each device.
          batch: split over the batch axes of the mesh.
          votes: int[n], a number of each device.
        """
        states, batches = self._on_devices(state), self._on_devices(batch)
        rows = self._each(lambda i: self._cut(batches[i]))
        numbers = np.arange(self._parts, dtype=np.int32).reshape(-1, len(rows[0]))
        order = list(self._mesh.devices.flat)
        places = [numbers[order.index(device)] for device in self._devices]
        if isinstance(self._task, MeanLoss):
            found, votes = self._from_means(states, rows, places, votes)
        else:
            found, votes = self._from_features(states, rows, places, votes)
        state, metrics = self._assembled(self._each(lambda i: self._apply(states[i], *found[i])))
        return state, metrics, votes

    def hardware_flops(self, state: TrainState, batch: Batch) -> int:
        """FLOPs of a step on all devices: of the parts alone, which are nearly all."""
        rows = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((x.shape[0] // self._parts, *x.shape[1:]), x.dtype),
            batch,
        )
        number = jax.ShapeDtypeStruct((), jnp.int32)
        if isinstance(self._task, MeanLoss):
            return self._parts * flops.count_flops(self._mean_of_part, state, rows, number)
        features = jax.eval_shape(self._features_of_part, state, rows, number)
        forward = flops.count_flops(self._features_of_part, state, rows, number)
        floats = _floating(features)
        both = flops.count_flops(self._gradient_of_part, state, rows, number, floats)
        return self._parts * (forward + both)

    # Means of rows.

    def _from_means(
        self, states: Sequence[TrainState], rows: Any, places: Any, votes: Array | None
    ) -> tuple[list[Any], Array | None]:
        def own(i: int) -> Any:
            parts = zip(rows[i], places[i], strict=True)
            return _tree_sum([functools.partial(self._of_part, states[i], *p) for p in parts])

        every, votes = self._everywhere(self._each(own), votes)
        return self._each(lambda i: self._mean(*_tree_sum(every[i]))), votes

    def _mean_of_part(self, state: TrainState, rows: Batch, number: Int[Array, ""]) -> Any:
        """Loss, metrics and gradients times their weight; sums; the weight."""

        def loss(trainable: Leaves) -> tuple[Array, Metrics]:
            model = self._merge(trainable, state.frozen)
            return self._task.loss(model, rows, _key(state, number))

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.trainable)
        by_tokens = self._task.mean_over == TOKENS
        weight = tokens_of(metrics) if by_tokens else jnp.float32(1)
        means = {name: x for name, x in metrics.items() if name != TOKENS}
        sums = {name: x for name, x in metrics.items() if name == TOKENS}
        return jax.tree.map(lambda x: weight * x, (value, means, grads)), sums, weight

    # Losses that compare rows.

    def _from_features(
        self, states: Sequence[TrainState], rows: Any, places: Any, votes: Array | None
    ) -> tuple[list[Any], Array | None]:
        def features(i: int) -> Any:
            parts = zip(rows[i], places[i], strict=True)
            return _joined([self._features(states[i], *part) for part in parts])

        every, _ = self._everywhere(self._each(features), None)
        found = self._each(lambda i: self._of_features(states[i], _joined(every[i])))

        def gradient(i: int) -> Any:
            by_rows = found[i][3]

            def of_part(part: Batch, number: np.int32) -> Leaves:
                wanted = _rows(by_rows, number, self._parts)
                return self._back(states[i], part, number, wanted)

            parts = zip(rows[i], places[i], strict=True)
            return _tree_sum([functools.partial(of_part, *part) for part in parts])

        every, votes = self._everywhere(self._each(gradient), votes)

        def whole(i: int) -> Any:
            value, metrics, direct, _ = found[i]
            return value, metrics, _add(direct, _tree_sum(every[i]))

        return self._each(whole), votes

    def _features_of_part(self, state: TrainState, rows: Batch, number: Int[Array, ""]) -> Any:
        model = self._merge(state.trainable, state.frozen)
        return self._task.features(model, rows, _key(state, number))

    def _loss_of_features(self, state: TrainState, features: Any) -> Any:
        """Loss, metrics, and gradients by the leaves and by the floating features."""

        def loss(trainable: Leaves, floats: list[Array]) -> tuple[Array, Metrics]:
            model = self._merge(trainable, state.frozen)
            return self._task.loss_of(model, _with_floating(features, floats))

        wanted = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (value, metrics), (direct, by_rows) = wanted(state.trainable, _floating(features))
        return value, metrics, direct, by_rows

    def _gradient_of_part(
        self, state: TrainState, rows: Batch, number: Int[Array, ""], wanted: list[Array]
    ) -> Leaves:
        def features(trainable: Leaves) -> list[Array]:
            model = self._merge(trainable, state.frozen)
            return _floating(self._task.features(model, rows, _key(state, number)))

        return jax.vjp(features, state.trainable)[1](wanted)[0]

    # Devices, and movements between them.

    def _each(self, call: Callable[[int], Any]) -> list[Any]:
        """Calls a function of single-device programs for each device of this process."""
        found = []
        for i, alone in enumerate(self._alone):
            with jax.set_mesh(alone):
                found.append(call(i))
        return found

    def _on_devices(self, tree: Any) -> list[Any]:
        """What lies on each device of this process."""

        def shard(x: Array, device: jax.Device, place: NamedSharding) -> Array:
            data = next(s.data for s in x.addressable_shards if s.device == device)
            return jax.device_put(data, place)  # of one type, so that the programs trace once

        return [
            jax.tree.map(
                functools.partial(shard, device=device, place=mesh_lib.replicated(alone)), tree
            )
            for device, alone in zip(self._devices, self._alone, strict=True)
        ]

    def _cut(self, rows: Batch) -> list[Batch]:
        """The parts of a device's rows."""
        count = self._parts // mesh_lib.batch_shards(self._mesh)
        return [jax.tree.map(lambda x, i=i: _part_of(x, i, count), rows) for i in range(count)]

    def _everywhere(
        self, own: Sequence[Any], votes: Array | None
    ) -> tuple[list[list[Any]], Array | None]:
        """What each of all devices has, in their order, on every device of this process."""
        split, devices = mesh_lib.batch_sharding(self._mesh), mesh_lib.batch_shards(self._mesh)
        rows = self._each(lambda i: jax.tree.map(lambda x: x[None], own[i]))

        def stacked(*leaves: Array) -> Array:
            shape = (devices, *leaves[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, split, leaves)

        found, votes = self._gather(jax.tree.map(stacked, *rows), votes)
        every = self._on_devices(found)
        return self._each(lambda i: _taken_apart(every[i], devices)), votes

    def _assembled(self, own: Sequence[Any]) -> Any:
        """Arrays that are whole on each device."""

        def join(*leaves: Array) -> Array:
            return jax.make_array_from_single_device_arrays(leaves[0].shape, self._whole, leaves)

        return jax.tree.map(join, *own)


@functools.partial(jax.jit, static_argnums=1)
def _taken_apart(stacked: Any, count: int) -> list[Any]:
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)]


def _key(state: TrainState, number: Int[Array, ""]) -> jax.Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    return jax.random.fold_in(key, number)


def _tree_sum(terms: Sequence[Any]) -> Any:
    """The sum of a power of 2 of terms as a binary tree; calls are made when they are needed."""
    if len(terms) == 1:
        return terms[0]() if callable(terms[0]) else terms[0]
    half = len(terms) // 2
    return _add(_tree_sum(terms[:half]), _tree_sum(terms[half:]))


@jax.jit
def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _divided(means: Any, sums: Metrics, weight: Array) -> tuple[Array, Metrics, Leaves]:
    value, metrics, grads = jax.tree.map(lambda x: x / jnp.maximum(weight, 1), means)
    return value, {**metrics, **sums}, grads


@functools.partial(jax.jit, static_argnums=(1, 2))
def _part_of(x: Array, index: int, count: int) -> Array:
    rows = x.shape[0] // count
    return x[index * rows : (index + 1) * rows]


@functools.partial(jax.jit, static_argnums=2)
def _rows(tree: Any, number: Int[Array, ""], parts: int) -> Any:
    """The rows of a part."""

    def take(x: Array) -> Array:
        rows = x.shape[0] // parts
        return jax.lax.dynamic_slice_in_dim(x, number * rows, rows)

    return jax.tree.map(take, tree)


@jax.jit
def _joined(parts: Sequence[Any]) -> Any:
    """Rows of parts, one after another."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _floating(tree: Any) -> list[Any]:
    """The floating leaves."""
    return [x for x in jax.tree.leaves(tree) if _is_floating(x)]


def _with_floating(tree: Any, floats: Iterable[Array]) -> Any:
    """The tree with other floating leaves."""
    own = iter(floats)
    return jax.tree.map(lambda x: next(own) if _is_floating(x) else x, tree)
