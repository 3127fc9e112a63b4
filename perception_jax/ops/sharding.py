"""The mesh's axis names, and the constraint that keeps activations split over them.

Under `jax.jit` the compiler places every intermediate array as it likes. With parameters split over
the same axis as the batch it may keep the whole global batch on every chip and reduce activations
instead of gathering weights; a constraint at the edges of blocks and towers leaves it no choice.

Letters: B batch, b a part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Shaped

from perception_jax.errors import ConfigError

REPLICA, FSDP, TENSOR = "replica", "fsdp", "tensor"
"""Names of the mesh axes."""
AXES = (REPLICA, FSDP, TENSOR)
"""All mesh axes; `shard.mesh` documents their use."""
BATCH_AXES = (REPLICA, FSDP)
"""Mesh axes that split a batch."""

_MESH_AXES = {"batch": BATCH_AXES, "tensor": (TENSOR,)}

Tree = TypeVar("Tree")
"""Type of a pytree."""


def constrain(x: Shaped[Array, "..."], *names: str | None) -> Shaped[Array, "..."]:
    """Constrains an array to the current mesh; without a mesh it is returned unchanged.

    Args:
      x: an intermediate array under `jax.jit`.
      names: one for each leading axis of `x`: "batch" splits it over `BATCH_AXES`, "tensor" over
        the axis of that name, None keeps it whole. Axes without a name are kept whole. An axis
        that the mesh does not divide (one image on eight chips) is left to the compiler.

    Raises:
      KeyError: an unknown name.
    """
    mesh, automatic = automatic_axes()
    spec = []
    for size, name in zip(x.shape, names, strict=False):
        axes = [] if name is None else [axis for axis in _MESH_AXES[name] if axis in automatic]
        divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
        spec.append(tuple(axes) or None if divides else PartitionSpec.UNCONSTRAINED)
    if not automatic or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def constrain_to(x: Shaped[Array, "..."], spec: PartitionSpec) -> Shaped[Array, "..."]:
    """Constrains an array to a spec on the current mesh; without a mesh it is returned unchanged.

    Axes that are not the compiler's to split, as those of a `jax.shard_map` around, are left out.
    """
    mesh, automatic = automatic_axes()
    if not automatic or mesh.size == 1:
        return x
    entries = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    kept = [tuple(axis for axis in entry if axis in automatic) or None for entry in entries]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*kept))


def automatic_axes(x: Array | None = None) -> tuple[AbstractMesh, list[str]]:
    """Returns the current mesh, and those of its axes over which the compiler splits arrays.

    Args:
      x: without a current mesh, the one that this array or tracer lies on is taken.
    """
    # The abstract mesh is the one that `jax.set_mesh` and `jax.shard_map` agree on.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and x is not None:
        mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return mesh, [axis for axis, kind in kinds if kind == AxisType.Auto]


def on_mesh() -> bool:
    """Whether the compiler splits what is traced now over several devices. The part of a device
    inside of a `jax.shard_map` is its own."""
    mesh, automatic = automatic_axes()
    return math.prod(mesh.shape[axis] for axis in automatic) > 1


def on_one_cpu() -> bool:
    """Whether what is traced now runs on one CPU device: that of the mesh, else JAX's default."""
    device = automatic_axes()[0].abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return platform == "cpu" and not on_mesh()


def constrain_batch(tree: Tree) -> Tree:
    """`constrain(x, "batch")` for every array of a pytree that has an axis."""
    return jax.tree.map(lambda x: constrain(x, "batch") if x.ndim else x, tree)


def in_parts(
    function: Callable[[Shaped[Array, "b ..."]], Shaped[Array, "b ..."]],
    x: Shaped[Array, "B ..."],
    parts: int,
) -> Shaped[Array, "B ..."]:
    """Applies a function of rows to a batch in equal parts, one after another.

    Intermediate arrays take the memory of one part; what the backward pass keeps (under `remat` the
    inputs of blocks) takes that of the whole batch. Every part is split over the mesh as the batch
    is, so that no row moves.

    Args:
      function: rows to rows, each independent of the others.
      parts: how many.

    Raises:
      ConfigError: the batch or its share of a chip cannot be divided.
    """
    if parts == 1:
        return function(x)
    mesh, rows = jax.sharding.get_abstract_mesh(), x.shape[0]
    shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    if parts < 1 or rows % (parts * shards):
        raise ConfigError(
            f"expected a batch that {parts} parts on {shards} shards of the mesh divide, found "
            f"{rows} rows. Set fewer parts, or a batch_size that is a multiple of "
            f"{max(parts, 1) * shards}."
        )
    split = jnp.swapaxes(x.reshape(rows // parts, parts, *x.shape[1:]), 0, 1)
    out = jax.lax.map(function, constrain(split, None, "batch"))
    joined = jnp.swapaxes(out, 0, 1).reshape(rows, *out.shape[2:])
    return constrain(joined, "batch")


def gathered(tree: Any) -> Any:
    """Gathers the arrays of a pytree as numpy arrays on every process.

    Where an array is spread over several processes this is a collective: all of them must call it.
    It needs as much host memory as the arrays take.
    """
    return jax.tree.map(_whole, tree)


def _whole(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
