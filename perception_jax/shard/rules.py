"""Where every leaf lives: a table of `(path regex, spec)` rows, first match wins.

A regex is searched anywhere in the leaf's "/"-joined path; anchor it with `^` and `$` where that
matters. A spec is a `PartitionSpec` over the mesh's axes or a function of shape and mesh that
makes one, such as `fsdp_largest_axis()`. A leaf without a row, or a row that does not fit its
leaf, is an error: nothing is replicated by accident.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perception_jax.errors import ConfigError

Spec = PartitionSpec | Callable[[tuple[int, ...], Mesh], PartitionSpec]
Rules = Sequence[tuple[str, Spec]]

_SHOWN = 8


def shardings(leaves: Mapping[str, Any], rules: Rules, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of each leaf.

    Args:
      leaves: anything with a `shape` (arrays, `jax.ShapeDtypeStruct`) by "/"-joined path.
      rules: see the module's docstring.

    Raises:
      ConfigError: naming each leaf that no row matches or whose row does not fit.
    """
    placed: dict[str, NamedSharding] = {}
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
        else:
            placed[path] = NamedSharding(mesh, spec)
    if problems:
        raise ConfigError(_message(problems, rules))
    return placed


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


def _misfit(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> str:
    """Why `spec` cannot place an array of `shape`; empty if it can."""
    if len(spec) > len(shape):
        return f"the leaf has only {len(shape)} axes"
    for index, entry in enumerate(spec):
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        missing = [name for name in names if name not in mesh.shape]
        if missing:
            return f"the mesh has no axis {missing[0]!r} (it has {', '.join(mesh.axis_names)})"
        parts = math.prod(mesh.shape[name] for name in names)
        if shape[index] % parts:
            return (
                f"axis {index} has {shape[index]} entries, which {'*'.join(names)}={parts} "
                "does not divide"
            )
    return ""


def _message(problems: list[str], rules: Rules) -> str:
    more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    listed = "\n  ".join(problems[:_SHOWN])
    return (
        f"{len(problems)} leaves cannot be placed on the mesh:\n  {listed}{more}\n"
        f"The rules are {[regex for regex, _ in rules]}. Add a row, or use "
        "`fsdp_largest_axis()` as the spec of a row to split what divides and replicate the rest."
    )
