"""What the parity tests measured, for the table in `docs/encoders_parity.md`.

`pytest tests/parity --table=docs/encoders_parity.md` writes it after a run without failures.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

_HEAD = """# Encoders: the same numbers as PyTorch

Written by `make parity ARGS=--table=docs/encoders_parity.md`. Float32 on CPU, matrix products at
the highest precision. A difference above 1e-4 (for most above 1e-5) fails a test.
"""
_COMPARED = """
## Outputs

The largest absolute difference over everything that was compared: embeddings, logits, all tokens,
and in the golden cases every hidden state. "Both ways": what we export is loaded by the other
side's own code with every name matched, and all weights are bit-equal. "Tiny" models have random
weights.

| model | names | tensors | parameters | compared with | both ways | largest difference |
| --- | --- | --- | --- | --- | --- | --- |
"""
_PUBLISHED = """
## Published sizes by shape alone

Every name and shape of a complete checkpoint, as PyTorch's own code builds the model at full size
(without memory for the weights).

| model | names | tensors | parameters |
| --- | --- | --- | --- |
"""

ROWS: list[Row] = []


@dataclasses.dataclass
class Row:
    """One comparison of a model.

    Attributes:
      model: for people to read.
      names: whose parameter names, e.g. "timm".
      against: what computed the expected numbers; "" for shapes alone.
      tensors, parameters: of the checkpoint.
      both_ways: whether the other side loaded our export and found the same bits.
      difference: the largest so far.
    """

    model: str
    names: str
    against: str = ""
    tensors: int = 0
    parameters: int = 0
    both_ways: bool = False
    difference: float = 0.0

    def __post_init__(self):
        ROWS.append(self)

    def close(self, ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
        """Asserts that no element differs by more than `tolerance`, and notes the largest."""
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        assert ours.shape == theirs.shape, f"{self.model}: {ours.shape}, not {theirs.shape}"
        worst = float(np.abs(ours - theirs).max(initial=0.0))
        self.difference = max(self.difference, worst)
        assert worst <= tolerance, f"{self.model}: deviates by {worst:.3g}, allowed {tolerance:.3g}"

    def read(self, report: Any) -> None:
        """Takes the counts from a key report."""
        self.tensors, self.parameters = report.tensors, report.parameters


def write(path: pathlib.Path) -> None:
    """The table as Markdown."""
    order = sorted(ROWS, key=lambda row: (row.model.lower(), row.names))
    compared = [
        f"| {row.model} | {row.names} | {row.tensors} | {row.parameters:,} | {row.against} | "
        f"{'yes' if row.both_ways else ''} | {row.difference:.1e} |"
        for row in order
        if row.against
    ]
    published = [
        f"| {row.model} | {row.names} | {row.tensors:,} | {row.parameters:,} |"
        for row in order
        if not row.against
    ]
    text = _HEAD + _COMPARED + "\n".join(compared) + "\n" + _PUBLISHED + "\n".join(published) + "\n"
    path.write_text(text, "utf-8")
