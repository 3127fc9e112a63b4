"""Weights of a model whose parts are in several checkpoints, and fresh ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from perception_jax.api.loaded import LazyWeights
from perception_jax.interop.key_report import KeyReport
from perception_jax.interop.load import Convert, LoadedParams, load_params
from perception_jax.interop.rules import RuleTable, identity_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinedWeights:
    """Weights of parts of a model; see `LazyWeights`.

    Attributes:
      parts: by where the paths of their leaves begin; "" has the leaves of no other part.
      rules: of the whole, for a mesh.
    """

    parts: Mapping[str, LazyWeights]
    rules: tuple[tuple[str, Any], ...]

    def read(
        self,
        *,
        dtype: np.dtype | None = None,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        targets: Mapping[str, jax.ShapeDtypeStruct] | None = None,
        convert: Mapping[str, Convert] | None = None,
    ) -> LoadedParams:
        placed, wanted, converts = map(self._by_part, (shardings, targets, convert))
        params: dict[str, jax.Array] = {}
        reports: dict[str, KeyReport] = {}
        for prefix, weights in self.parts.items():
            one = weights.read(
                dtype=dtype,
                shardings=placed and placed[prefix],
                targets=wanted and wanted[prefix],
                convert=converts and converts[prefix],
            )
            params |= {prefix + path: leaf for path, leaf in one.params.items()}
            reports[prefix] = one.report
        return LoadedParams(params, joined_report(reports))

    def _by_part(self, leaves: Mapping[str, Any] | None) -> dict[str, dict[str, Any]] | None:
        """Some leaves of the model by part, under their paths in it."""
        if leaves is None:
            return None
        found: dict[str, dict[str, Any]] = {prefix: {} for prefix in self.parts}
        for path, leaf in leaves.items():
            prefix = max((p for p in self.parts if path.startswith(p)), key=len)
            found[prefix][path.removeprefix(prefix)] = leaf
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableWeights:
    """Weights that a table of rules finds in some tensors; see `LazyWeights`.

    Attributes:
      table: the name rules.
      files: the tensors.
      leaves: shape and dtype of each leaf by its path.
    """

    table: RuleTable
    files: Mapping[str, np.ndarray]
    leaves: Mapping[str, jax.ShapeDtypeStruct]
    rules: tuple[tuple[str, Any], ...] = ()

    def read(self, **places: Any) -> LoadedParams:
        return load_params(self.table, self.files, self.leaves, **places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreshWeights:
    """Initial weights; see `LazyWeights`.

    Attributes:
      init: makes the leaves by path.
    """

    init: Callable[[], Mapping[str, jax.Array]]
    rules: tuple[tuple[str, Any], ...] = ()

    def read(self, **places: Any) -> LoadedParams:
        leaves = {path: np.asarray(leaf) for path, leaf in jax.jit(self.init)().items()}
        table = identity_table(leaves)
        shapes = {p: jax.ShapeDtypeStruct(x.shape, x.dtype) for p, x in leaves.items()}
        return load_params(table, leaves, shapes, **places)


def joined_report(reports: Mapping[str, KeyReport]) -> KeyReport:
    """The report on all parts; files are listed under the names of their parts."""

    def total(name: str) -> int:
        return sum(getattr(one, name) for one in reports.values())

    def merged(name: str) -> dict[Any, Any]:
        pairs = (pair for one in reports.values() for pair in getattr(one, name).items())
        return dict(pairs)

    counts: dict[Any, int] = {}
    for one in reports.values():
        for change, count in one.dtypes.items():
            counts[change] = counts.get(change, 0) + count
    return KeyReport(
        **{name: total(name) for name in ("tensors", "leaves", "parameters", "nbytes")},
        **{name: merged(name) for name in ("ignored", "left")},
        **{
            name: {
                prefix + path: value
                for prefix, one in reports.items()
                for path, value in getattr(one, name).items()
            }
            for name in ("defaults", "constants")
        },
        buffers=tuple(name for one in reports.values() for name in one.buffers),
        copies=tuple(name for one in reports.values() for name in one.copies),
        aside=tuple(name for one in reports.values() for name in one.aside),
        dtypes=counts,
        read={
            f"{prefix} {role}".strip(): file
            for prefix, one in reports.items()
            for role, file in one.read.items()
        },
    )
