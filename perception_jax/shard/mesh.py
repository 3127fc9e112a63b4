"""The device mesh: three named axes that every program of the library uses.

- `replica`: copies of the whole model, each with its share of the batch; the only axis that may go
  from one TPU slice to another;
- `fsdp`: the batch is split, and parameters are too (gathered when needed);
- `tensor`: layers are split, the batch is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from perception_jax.errors import ConfigError
from perception_jax.ops.sharding import AXES, BATCH_AXES


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh's axes; one of them may be -1: whatever devices remain."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


def make_mesh(
    replica: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh with the axes `AXES`, all of type Auto (the compiler propagates shardings).

    Args:
      replica, fsdp, tensor: axis sizes; one may be -1.
      devices: the devices to use; all by default. Those of several TPU slices are ordered so that
        `fsdp` and `tensor` stay inside a slice.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or `fsdp` or `tensor` would
        go from one TPU slice to another.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _resolve((replica, fsdp, tensor), len(devices))
    kinds = (AxisType.Auto,) * len(AXES)
    slices = _slices(devices)
    arranged = over_slices(sizes, devices, slices) if slices > 1 else in_a_slice(sizes, devices)
    return Mesh(arranged, AXES, axis_types=kinds)


def in_a_slice(sizes: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Arranges the devices of one slice so that those next to each other are linked.

    Args:
      sizes: of `AXES`.
    """
    # `jax.make_mesh` splits an axis of the torus over several of the mesh on v5e alone; elsewhere
    # it refuses meshes such as 4 × 64 of 16 × 16 chips, or 32 × 2 of 4 × 4 × 4.
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def over_slices(sizes: tuple[int, int, int], devices: Sequence[Any], slices: int) -> np.ndarray:
    """Arranges the devices of several slices, those of a slice next to each other.

    Args:
      sizes: of `AXES`.
      devices: have a `slice_index`.

    Raises:
      ConfigError: the slices do not divide the replicas.
    """
    replica, fsdp, tensor = sizes
    chips = len(devices) // slices
    if replica % slices:
        inside = math.gcd(chips, tensor)
        raise ConfigError(
            f"the devices are {slices} slices of {chips} chips, and with mesh.replica={replica} "
            f"mesh.fsdp={fsdp} mesh.tensor={tensor} the parts of a layer would be gathered over "
            "the slow network between the slices. Only replicas may be on different slices: "
            f"mesh.replica={slices} mesh.fsdp={chips // inside} mesh.tensor={inside}."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (replica // slices, fsdp, tensor),
        (slices, 1, 1),
        devices,
        allow_split_physical_axes=True,
    )


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Splits an axis, the leading one by default, over `BATCH_AXES`."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces into which `batch_sharding` splits a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of several devices that the arrays of a pytree or module lie on, or None."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh if sharding.mesh.size > 1 else None
    return None


def check_batch(mesh: Mesh, batch_size: int, hosts: int = 1, accumulate: int = 1) -> None:
    """Raises an error if the batch shards of the mesh or the hosts do not divide the global batch.

    Args:
      accumulate: micro-batches into which the batch is cut; each must be divided.

    Raises:
      ConfigError: with the mesh that fits.
    """
    shards, tensor = batch_shards(mesh), mesh.shape["tensor"]
    rows = batch_size // accumulate
    if batch_size % accumulate == 0 and rows % shards == 0 and rows % hosts == 0:
        return
    fitting = max(d for d in range(1, mesh.size + 1) if mesh.size % d == 0 and rows % d == 0)
    larger = math.lcm(shards, hosts) * accumulate
    micro = f" in {accumulate} micro-batches (optim.accumulate)" if accumulate > 1 else ""
    raise ConfigError(
        f"batch_size {batch_size}{micro} must be divisible by the {shards} batch shards of the "
        f"mesh ({dict(mesh.shape)}) and the {hosts} hosts. A mesh of {mesh.size} chips that fits "
        f"it: mesh.replica=1 mesh.fsdp={fitting} mesh.tensor={mesh.size // fitting}; or set a "
        f"batch_size that is a multiple of {larger} for tensor={tensor}."
    )


def _slices(devices: Sequence[jax.Device]) -> int:
    """Number of TPU slices; 1 elsewhere: GPUs number their NVLink domains there, and splitting
    parameters over several of these is usual."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})


def _resolve(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    unknown = [axis for axis, size in zip(AXES, sizes, strict=True) if size == -1]
    if len(unknown) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(
            f"mesh sizes must be positive, at most one -1; found {named}. "
            "Set all but one of them, e.g. replica=1 fsdp=-1 tensor=1."
        )
    known = math.prod(size for size in sizes if size != -1)
    if unknown and count % known == 0:
        return tuple(count // known if size == -1 else size for size in sizes)
    if unknown or known != count:
        divides = "must divide" if unknown else "must equal"
        raise ConfigError(
            f"the product of the mesh sizes ({known}) {divides} the number of devices ({count}); "
            f"found {named}. Sizes that fit {count}: {_suggestions(count)}."
        )
    return sizes


def _suggestions(count: int) -> str:
    divisors = [d for d in range(1, count + 1) if count % d == 0][:4]
    return "; ".join(f"replica=1 fsdp={count // d} tensor={d}" for d in divisors)
