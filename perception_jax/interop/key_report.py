"""The key report: how an import used every tensor name."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyReport:
    """The use of every tensor name; `str()` gives a readable summary.

    Attributes:
      tensors: source tensors that were read.
      leaves: leaves that were filled.
      parameters: elements of the leaves.
      nbytes: bytes of the leaves, each counted once.
      ignored: source names that were dropped → why.
      defaults: leaves that the checkpoint does not have → the value they were given.
      constants: leaves that the layout never stores → their value.
      buffers: source names that hold no parameters and were as expected.
      copies: source names that repeat a tensor under another name, and were equal to it.
      dtypes: (stored dtype, loaded dtype) → number of leaves.
      aside: source names outside the requested part.
      read: what the model was made of ("weights", "settings", "image processor") → the file, or
        what stands for it.
      left: files of weights or settings next to those that were read → why they were not.
    """

    tensors: int
    leaves: int
    parameters: int
    nbytes: int
    ignored: Mapping[str, str]
    defaults: Mapping[str, float]
    constants: Mapping[str, float]
    buffers: tuple[str, ...]
    copies: tuple[str, ...]
    dtypes: Mapping[tuple[str, str], int]
    aside: tuple[str, ...] = ()
    read: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.tensors} tensors → {self.leaves} leaves, {self.parameters:,} parameters, "
            f"{self.nbytes / 2**20:,.1f} MiB; every name accounted for"
        ]
        lines += [f"  read     {role}: {file}" for role, file in self.read.items()]
        for reason, names in _by_value(self.left).items():
            lines.append(f"  left     {_few(names)}: {reason}")
        for (stored, loaded), count in self.dtypes.items():
            change = stored if stored == loaded else f"{stored} → {loaded}"
            lines.append(f"  dtype    {change}: {count} leaves")
        for reason, names in _by_value(self.ignored).items():
            lines.append(f"  ignored  {_few(names)}: {reason}")
        for value, names in _by_value(self.defaults).items():
            lines.append(f"  default  {_few(names)} = {value}, not in the checkpoint")
        for value, names in _by_value(self.constants).items():
            lines.append(f"  constant {_few(names)} = {value}, never stored in this layout")
        if self.buffers:
            lines.append(f"  buffer   {_few(self.buffers)}: as computed from the configuration")
        if self.aside:
            lines.append(f"  aside    {_few(self.aside)}: outside the requested part")
        if self.copies:
            lines.append(f"  copy     {_few(self.copies)}: equal to the tensor it repeats")
        return "\n".join(lines)


def _by_value(names: Mapping[str, object]) -> dict[object, list[str]]:
    groups = collections.defaultdict(list)
    for name, value in names.items():
        groups[value].append(name)
    return groups


def _few(names: Sequence[str]) -> str:
    rest = len(names) - 2
    return ", ".join(names[:2]) + (f" and {rest} more" if rest > 0 else "")
