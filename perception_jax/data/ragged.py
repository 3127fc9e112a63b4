"""Integer lists of different lengths, one for each row, as two flat arrays."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Int32


@dataclasses.dataclass(frozen=True, eq=False)
class RaggedRows:
    """Integer lists, one for each row; that of row r is `values[starts[r]:starts[r + 1]]`."""

    values: Int32[np.ndarray, "_"]
    starts: Int[np.ndarray, "_"]

    @classmethod
    def build(
        cls, rows: Int[np.ndarray, " N"], values: Int[np.ndarray, " N"], count: int
    ) -> RaggedRows:
        """Groups values by their row, for `count` rows; values of one row keep their order."""
        order = np.argsort(rows, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
        return cls(np.asarray(values, np.int32)[order], starts)

    @classmethod
    def distinct(
        cls, rows: Int[np.ndarray, " N"], values: Int[np.ndarray, " N"], shape: tuple[int, int]
    ) -> RaggedRows:
        """The distinct values of each row, ascending; `shape`: number of rows and of values."""
        width = max(1, shape[1])
        keys = np.sort(rows * np.int64(width) + values)
        keys = keys[np.diff(keys, prepend=-1) != 0]
        return cls.build(keys // width, keys % width, shape[0])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def counts(self, rows: Int[np.ndarray, "*R"] | None = None) -> Int[np.ndarray, "..."]:
        """Lengths of the lists of some rows, or of all."""
        if rows is None:
            return np.diff(self.starts)
        return self.starts[rows + 1] - self.starts[rows]

    def rows(self) -> Int[np.ndarray, "_"]:
        """The row of each value."""
        return np.repeat(np.arange(len(self)), self.counts())

    def of(self, row: int) -> Int32[np.ndarray, "_"]:
        """The list of one row."""
        return self.values[self.starts[row] : self.starts[row + 1]]

    def padded(
        self, rows: Int[np.ndarray, " R"]
    ) -> tuple[Int32[np.ndarray, "R _"], Bool[np.ndarray, "R _"]]:
        """The lists of some rows, padded to the same length, and a mask of the valid places."""
        counts = self.counts(rows)
        places = np.arange(max(1, int(counts.max(initial=0))))
        valid = places < counts[:, None]
        if not len(self.values):
            return np.zeros(valid.shape, np.int32), valid
        return self.values[np.where(valid, self.starts[rows][:, None] + places, 0)], valid

    def without(self, other: RaggedRows, width: int) -> RaggedRows:
        """Removes the values that the same row of `other` has; all values are below `width`."""
        taken = other.rows() * width + other.values
        kept = ~np.isin(self.rows() * width + self.values, taken)
        return RaggedRows.build(self.rows()[kept], self.values[kept], len(self))
