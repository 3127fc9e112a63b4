"""Compares a checkpoint's names and shapes with the model and reports all mismatches at once."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from perception_jax.errors import CheckpointError
from perception_jax.interop.binding import Binding, listing
from perception_jax.interop.rules import RuleTable
from perception_jax.interop.tensors import Shape, tensor_specs

_HINTS = 8
"""Names that get a hint; looking for near names takes time."""
_LOOKED_AT, _LONGEST = 2000, 200
"""Names among which a near one is looked for, and their characters: the time grows with the
squares of lengths that a hostile file chooses."""


@dataclasses.dataclass(frozen=True)
class Match:
    """A checkpoint whose names and shapes match the model.

    Attributes:
      files: names in the rules' spelling → names in the files.
      absent: bindings whose leaves get their rule's default.
      ignored: names in the files → why they are dropped.
      buffers, copies: names in the files that were compared and are equal.
    """

    files: Mapping[str, str]
    absent: frozenset[tuple[str, ...]]
    ignored: Mapping[str, str]
    buffers: tuple[str, ...]
    copies: tuple[str, ...]


def match(
    table: RuleTable,
    bindings: Sequence[Binding],
    files: Mapping[str, np.ndarray],
    floating: Mapping[str, bool],
) -> Match:
    """Compares all names and shapes, reading only buffers and copies.

    Args:
      floating: whether each leaf holds floating-point numbers.

    Raises:
      CheckpointError: names that are missing or that nothing uses, wrong shapes or kinds of
        numbers, buffers or copies with other contents; all of them together, missing names with
        the nearest one present.
    """
    matcher = _Matcher(table, files, floating)
    for binding in bindings:
        matcher.bind(binding)
    matcher.classify_rest()
    matcher.raise_problems()
    return Match(
        files=matcher.used,
        absent=frozenset(matcher.absent),
        ignored=matcher.ignored,
        buffers=tuple(matcher.buffers),
        copies=tuple(matcher.copies),
    )


class _Matcher:
    """Collects what fits and what does not."""

    def __init__(
        self,
        table: RuleTable,
        files: Mapping[str, np.ndarray],
        floating: Mapping[str, bool],
    ):
        self.table, self.files, self.floating = table, files, floating
        self.specs = tensor_specs(files)
        self.used: dict[str, str] = {}
        self.absent: set[tuple[str, ...]] = set()
        self.ignored: dict[str, str] = {}
        self.buffers: list[str] = []
        self.copies: list[str] = []
        self.missing: list[tuple[str, Shape, tuple[str, ...]]] = []
        self.unused: list[str] = []
        self.wrong: list[str] = []
        self.names = self._renamed()
        self.rest = dict(self.names)

    def bind(self, binding: Binding) -> None:
        """Finds the tensors of a binding among the file's."""
        layers = zip(binding.layers, binding.copies, strict=True)
        wanted = [
            (name, shape, copies)
            for names, copies in layers
            for name, shape in zip(names, binding.source_shapes, strict=True)
        ]
        present = [item for item in wanted if any(n in self.names for n in (item[0], *item[2]))]
        if not present and wanted and binding.rule.default is not None:
            self.absent.add(binding.targets)
            return
        for name, shape, copies in wanted:
            self._use(name, shape, copies, binding.targets)

    def classify_rest(self) -> None:
        """Buffers, ignored names, and names that nothing uses."""
        for name, file_name in self.rest.items():
            if name in self.table.buffers:
                self._check_equal(file_name, self.table.buffers[name], "the configuration")
                self.buffers.append(file_name)
            elif reason := self.table.ignored_because(name):
                self.ignored[file_name] = reason
            else:
                self.unused.append(name)

    def raise_problems(self) -> None:
        if not (self.missing or self.unused or self.wrong):
            return
        hints = _hints([name for name, _, _ in self.missing[:_HINTS]], self.unused)
        lines = [
            f"missing {name} {shape}, for {', '.join(targets)}" + hints.get(name, "")
            for name, shape, targets in self.missing
        ]
        unused = [f"unknown {name} {self.specs[self.names[name]].shape}" for name in self.unused]
        raise CheckpointError(
            f"Expected a checkpoint that fits the model name by name; found {len(self.specs)} "
            f"tensors, of which unknown: {len(self.unused)}, missing: {len(self.missing)}, of "
            f"other shape or contents: {len(self.wrong)}:\n"
            + "\n".join(listing(group) for group in (lines, unused, self.wrong) if group)
            + "\nIs this a checkpoint of another model, size or layout? If not, its configuration "
            "or the model's params.py needs correcting."
        )

    def _renamed(self) -> dict[str, str]:
        names: dict[str, str] = {}
        for file_name in self.specs:
            name = self.table.rename(file_name)
            if name in names:
                self.wrong.append(f"{file_name} and {names[name]} both mean {name}")
            names[name] = file_name
        return names

    def _use(
        self, name: str, shape: Shape, copies: Sequence[str], targets: tuple[str, ...]
    ) -> None:
        present = [self.names[n] for n in (name, *copies) if n in self.names]
        for used in (name, *copies):
            self.rest.pop(used, None)
        if not present:
            self.missing.append((name, shape, targets))
            return
        self.used[name] = present[0]
        found = self.specs[present[0]]
        if found.shape != shape:
            self.wrong.append(
                f"{present[0]} has shape {found.shape}, expected {shape}, for {', '.join(targets)}"
            )
            return
        if jax.dtypes.issubdtype(found.dtype, np.floating) != self.floating[targets[0]]:
            kind = "floating-point numbers" if self.floating[targets[0]] else "integers"
            self.wrong.append(
                f"{present[0]} has dtype {found.dtype}, expected {kind}, for {', '.join(targets)}"
            )
            return
        for copy in present[1:]:
            self._check_equal(copy, self.files[present[0]], present[0])
            self.copies.append(copy)

    def _check_equal(self, file_name: str, expected: np.ndarray, where: str) -> None:
        found = self.files[file_name]
        if found.shape != expected.shape or not np.array_equal(found, expected):
            self.wrong.append(f"{file_name} differs from {where}, expected equal contents")


def _hints(missing: Iterable[str], unused: Sequence[str]) -> dict[str, str]:
    near_enough = [name for name in unused if len(name) <= _LONGEST][:_LOOKED_AT]
    near = {name: difflib.get_close_matches(name, near_enough, n=1) for name in missing}
    return {name: f"; did you mean {found[0]}?" for name, found in near.items() if found}
