"""Where every leaf lives: a table of `(path regex, spec)` rows, first match wins.

A regex is searched anywhere in the leaf's "/"-joined path; anchor it with `^` and `$` where that
matters. A spec is a `PartitionSpec` over the mesh's axes or a function of shape and mesh that
makes one, such as `fsdp_largest_axis()`. A leaf without a row, or a row for other axes than the
leaf and the mesh have, is an error: nothing is replicated by accident.

Published sizes do not divide every slice (a width of 1,152 does not split over 256 chips). A mesh
axis that does not divide the leaf's axis named for it moves to another one that the row names, or
else leaves the leaf whole on that mesh axis; each such leaf is listed in `ShardingPlan.fallbacks`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from perception_jax.errors import ConfigError

Spec = PartitionSpec | Callable[[tuple[int, ...], Mesh], PartitionSpec]
"""A PartitionSpec, or a function of shape and mesh that returns one."""
Rules = Sequence[tuple[str, Spec]]
"""Rows of path regex and spec; the first match wins."""

_SHOWN = 8

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """Shardings of all leaves, and the fallbacks among them.

    Attributes:
      shardings: of each leaf by path.
      fallbacks: the spec that the row gives, for each leaf that it does not divide.
    """

    shardings: dict[str, NamedSharding]
    fallbacks: dict[str, PartitionSpec]

    def explain(self) -> str:
        """Lists the fallbacks, one per line; "" if there are none."""
        listed = [
            f"{path}: {self.shardings[path].spec} instead of {wanted}"
            for path, wanted in self.fallbacks.items()
        ]
        more = [f"… and {len(listed) - _SHOWN} more"] if len(listed) > _SHOWN else []
        return "\n  ".join(listed[:_SHOWN] + more)


def shardings(leaves: Mapping[str, Any], rules: Rules, mesh: Mesh) -> dict[str, NamedSharding]:
    """Returns the sharding of each leaf; fallbacks are logged.

    Args, Raises: as of `place`.
    """
    placement = place(leaves, rules, mesh)
    if placement.fallbacks:
        _log.warning(
            "%d of %d leaves are not split as their rules say, since the mesh %s does not divide "
            "their axes:\n  %s",
            len(placement.fallbacks),
            len(leaves),
            dict(mesh.shape),
            placement.explain(),
        )
    return placement.shardings


def place(leaves: Mapping[str, Any], rules: Rules, mesh: Mesh | AbstractMesh) -> ShardingPlan:
    """Computes the sharding of each leaf and which of them are fallbacks.

    Args:
      leaves: anything with a `shape` (arrays, `jax.ShapeDtypeStruct`) by "/"-joined path.
      rules: see the module's docstring.

    Raises:
      ConfigError: naming each leaf that no row matches or whose row does not fit.
    """
    placed: dict[str, NamedSharding] = {}
    fallbacks: dict[str, PartitionSpec] = {}
    problems = []
    for path, leaf in leaves.items():
        shape = tuple(leaf.shape)
        row = next(((regex, spec) for regex, spec in rules if re.search(regex, path)), None)
        if row is None:
            problems.append(f"{path} {shape}: no row matches")
            continue
        regex, spec = row
        spec = spec if isinstance(spec, PartitionSpec) else spec(shape, mesh)
        problem = _misfit(shape, spec, mesh)
        if problem:
            problems.append(f"{path} {shape}: row {regex!r} gives {spec}, but {problem}")
            continue
        fitting = _fitting(shape, spec, mesh)
        if fitting != spec:
            fallbacks[path] = spec
        placed[path] = NamedSharding(mesh, fitting)
    if problems:
        raise ConfigError(_message(problems, rules))
    return ShardingPlan(placed, fallbacks)


def fsdp_largest_axis(
    axis: str = "fsdp", *, min_size: int = 2**12
) -> Callable[[tuple[int, ...], Mesh], PartitionSpec]:
    """A spec that splits the largest axis that divides, or replicates the leaf if none does.

    Args:
      axis: the mesh axis to split over.
      min_size: leaves with fewer elements are replicated: gathering them costs more than they do.
    """

    def spec(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        fitting = [i for i, size in enumerate(shape) if size % mesh.shape[axis] == 0]
        if not fitting or math.prod(shape) < min_size:
            return PartitionSpec()
        largest = max(fitting, key=lambda i: shape[i])
        return PartitionSpec(*(axis if i == largest else None for i in range(largest + 1)))

    return spec


def _fitting(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """`spec` where the mesh divides the leaf's axes; else what comes nearest to it.

    Axes for which `spec` has None stay whole: `lax.scan` walks along the layers of a stack.
    """
    kept: dict[int, tuple[str, ...]] = {}
    displaced = []
    for index, entry in enumerate(spec):
        names = _names(entry)
        if names and shape[index] % _parts(names, mesh):
            displaced += names
            names = ()
        if entry is not None:
            kept[index] = names
    if not displaced:
        return spec
    for name in displaced:
        # The largest share first, so that what remains of an axis is as even as can be.
        for index in sorted(kept, key=lambda i: -shape[i] // _parts(kept[i], mesh)):
            if shape[index] % _parts((*kept[index], name), mesh) == 0:
                kept[index] = (*kept[index], name)
                break
    entries = [kept.get(index) for index in range(len(spec))]
    return PartitionSpec(*(e[0] if e and len(e) == 1 else e or None for e in entries))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _parts(names: Sequence[str], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in names)


def _misfit(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> str:
    """Why `spec` says nothing about an array of `shape`; empty if it does."""
    if len(spec) > len(shape):
        return f"the leaf has only {len(shape)} axes"
    for entry in spec:
        missing = [name for name in _names(entry) if name not in mesh.shape]
        if missing:
            return f"the mesh has no axis {missing[0]!r} (it has {', '.join(mesh.axis_names)})"
    return ""


def _message(problems: list[str], rules: Rules) -> str:
    more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    listed = "\n  ".join(problems[:_SHOWN])
    return (
        f"{len(problems)} leaves cannot be placed on the mesh:\n  {listed}{more}\n"
        f"The rules are {[regex for regex, _ in rules]}. Add a row, or use "
        "`fsdp_largest_axis()` as the spec of a row to split what divides and replicate the rest."
    )
