"""Inspection of a compiled program: arrays and collectives of one device, parsed from its text.

Equal results do not show that a program is sharded; the shapes in it do. They are those of one
device, so an array that is split over eight devices has an eighth of its size here.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping

import jax

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<types>\(.*?\)|\S+) (?P<name>[\w\-]+)\(")
_ARRAY = re.compile(r"\b(?P<dtype>pred|bf16|[fsuc]\d+(?:e\d+m\d+\w*)?)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Result:
    """The output array of an operation on one device.

    Attributes:
      operation: XLA's name of the operation, such as "fusion" or "all-gather".
      dtype: XLA's name of the dtype, such as "f32" or "bf16".
      shape: on one device.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_collective(self) -> bool:
        """Whether it comes from other devices."""
        return self.operation.removesuffix("-start").removesuffix("-done") in _COLLECTIVES


def text(compiled: jax.stages.Compiled) -> str:
    """The program's text; "" where jaxlib cannot read what libtpu made: some programs for v5p have
    `async-update`s with several operands, which jaxlib 0.10.2 refuses."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return ""


def results(compiled: jax.stages.Compiled) -> Iterator[Result]:
    """Every array that an operation gives, those inside fusions and loops among them; parameters
    and constants are left out.

    An operation with several results gives one `Result` for each.
    """
    for line in text(compiled).splitlines():
        found = _OPERATION.match(line)
        if found is None or found["name"] in ("parameter", "constant"):
            continue
        for array in _ARRAY.finditer(found["types"]):
            yield Result(found["name"], array["dtype"], _shape(array))


def parse_results(line: str) -> list[Result]:
    """The arrays that a line of a program's text gives."""
    found = _OPERATION.match(line)
    arrays = [] if found is None else _ARRAY.finditer(found["types"])
    return [Result(found["name"], array["dtype"], _shape(array)) for array in arrays]


def collectives(compiled: jax.stages.Compiled) -> Mapping[Result, int]:
    """Counts the collectives of the program by kind; one in a loop's body counts once."""
    return collections.Counter(found for found in results(compiled) if found.is_collective)


def _shape(array: re.Match[str]) -> tuple[int, ...]:
    return tuple(int(size) for size in array["shape"].split(",") if size)
