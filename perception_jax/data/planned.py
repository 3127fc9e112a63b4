"""Planned training batches: a planner decides the rows, groups and shapes of each batch.

    (epoch, step) → plan of the global batch → row → its record, read → the row's arrays → batch

A planner decides everything by number alone, so the batches are the same on any number of hosts and
workers, and an iterator resumes by its position. A record that cannot be read is replaced in its
row by another of the row's own group: rows never move to another place, so groups stay whole.
Letters: M rows of a global batch.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import threading
import traceback
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int

from perception_jax.data import pixel_budget, records
from perception_jax.data.loader import (
    Crash,
    Example,
    HostShare,
    LoadedExamples,
    Redrawn,
    host_share,
    stack,
)
from perception_jax.data.skipping import MAX_BAD_FRACTION, OnSkip, Skipped, Watch
from perception_jax.errors import ConfigError, DataError

BATCHES = 1_000_000
"""Batches of a planned data set: more than any run takes, and the same for every run, since a saved
position names the length."""

_PLANS_KEPT = 8
_MOST_REDRAWS = 1000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a planned batch.

    Attributes:
      record: number of its record in the source.
      group: rows of one batch with equal numbers belong together.
      seed: of the row's own random numbers, for `np.random.default_rng`.
      shape: of the batch's arrays; None where all batches have the same.
      values: what else the plan says of the row, by name.
    """

    record: int
    group: int
    seed: tuple[int, ...]
    shape: Hashable = None
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def plan(self) -> BatchPlan:
        """Returns the plan of a batch of this row alone."""
        return BatchPlan(
            record=np.array([self.record]),
            group=np.array([self.group]),
            columns={name: np.asarray(value)[None] for name, value in self.values.items()},
            shape=self.shape,
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BatchPlan:
    """A planned global batch as arrays of numbers.

    Attributes:
      record: of each row, its record's number in the source.
      group: of each row; see `Row`.
      columns: further arrays [M] by name.
      shape: of the batch's arrays; None where all batches have the same.
    """

    record: Int[np.ndarray, " M"]
    group: Int[np.ndarray, " M"]
    columns: Mapping[str, np.ndarray]
    shape: Hashable = None

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a column of the plan."""
        return self.columns[name]

    def row(self, place: int, seed: tuple[int, ...]) -> Row:
        """Returns the row at a position of the batch."""
        return Row(
            record=int(self.record[place]),
            group=int(self.group[place]),
            seed=seed,
            shape=self.shape,
            values={name: values[place] for name, values in self.columns.items()},
        )

    def part(self, share: HostShare) -> BatchPlan:
        """Returns the rows that a host loads."""
        own = slice(share.host, None, share.hosts)
        return BatchPlan(
            record=self.record[own],
            group=self.group[own],
            columns={name: values[own] for name, values in self.columns.items()},
            shape=self.shape,
        )


@runtime_checkable
class Planner(Protocol):
    """Draws batches; picklable and deterministic."""

    @property
    def seed(self) -> int:
        """Seed of all random choices."""

    @property
    def batch_size(self) -> int:
        """Number of rows of a global batch."""

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches per epoch."""

    def plan(self, epoch: int, step: int) -> BatchPlan:
        """Plans the batch of a step (from 0) of an epoch (from 0)."""

    def redraws(self, epoch: int, step: int, place: int) -> Iterator[Row]:
        """Yields rows that may replace a row of that batch, in the order in which to try them."""


@runtime_checkable
class RowTransform(Protocol):
    """Makes the arrays of rows; picklable and thread-safe."""

    def read(self, record: records.Record, shape: Hashable) -> Any:
        """What all rows of a record share, such as its processed pixels: this is what is kept in
        memory if anything is. Raises `DataError` for a record that cannot be used."""

    def __call__(self, read: Any, row: Row) -> dict[str, np.ndarray]:
        """Arrays whose names and dtypes are the same for all rows, and whose shapes are the same
        for all rows of one `Row.shape`."""

    def described(self, record: records.Record, row: Row) -> records.Record:
        """The record with what the row asks about it for inspection."""


@runtime_checkable
class BatchTransform(RowTransform, Protocol):
    """A `RowTransform` that can make the arrays of many rows at once, which data in memory need to
    be fast; without random numbers of the rows' seeds."""

    def batch(self, read: Sequence[Any], plan: BatchPlan) -> dict[str, np.ndarray]:
        """Stacked arrays of all rows of a plan, from what was read of the record of each."""


class PlannedData:
    """The rows that a planner makes from a source, as training batches or one by one for
    inspection.

    `data[k]` is the record of row k of all batches in order, with its arrays; it raises `DataError`
    if the planned record cannot be used.

    Attributes:
      planner: of the batches.
      record_count: number of records of the source.
    """

    def __init__(
        self,
        source: records.Source,
        planner: Planner,
        transform: RowTransform,
        *,
        in_memory: bool = False,
        max_bad_fraction: float = MAX_BAD_FRACTION,
        on_skip: OnSkip | None = None,
    ) -> None:
        """Configures planned data.

        Args:
          in_memory: keep what is read of each record, for data that fit in memory; they are then
            loaded by threads alone.
          max_bad_fraction: of records that may be unusable; see `data.skipping`.
          on_skip: called once per unusable record, besides the log.
        """
        self.planner, self.record_count = planner, len(source)
        self._in_memory = in_memory
        self._load = _RowLoader(source, planner, transform, in_memory)
        self._watch = Watch(self.record_count, max_bad_fraction, on_skip)

    def __len__(self) -> int:
        return BATCHES * self.planner.batch_size

    def __getitem__(self, index: int) -> tuple[records.Record, Example]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._load.shown(index)

    def examples(self, seed: int) -> PlannedData:
        """Itself: the plans have decided everything, whatever the seed."""
        del seed
        return self

    def loader(
        self,
        *,
        batch_size: int | None = None,
        num_workers: int = 0,
        host: tuple[int, int] | None = None,
    ) -> grain.IterDataset:
        """Returns an endless loader of this host's part of each batch.

        Args:
          batch_size: what the trainer expects, to compare with the planner's; None does not.
          num_workers: processes that load; 0 loads in threads of this process.
          host: index and number of hosts; None asks JAX.

        Returns:
          An `IterDataset` of dicts as `data.loader.make_loader` gives it.

        Raises:
          ConfigError: sizes that do not fit together. While iterating, `DataError` as there, and
            if none of the records that may take a row's place can be used.
        """
        planned = self.planner.batch_size
        if batch_size not in (None, planned):
            raise ConfigError(
                f"batch_size: expected {planned}, the rows of a planned batch, found {batch_size}. "
                "Change it, or the planner's settings."
            )
        share = host_share(planned, 0 if self._in_memory else num_workers, host)
        if self._in_memory:
            whole = functools.partial(self._load.batch, share)
            elements, rows = grain.MapDataset.range(BATCHES).map(whole), share.batch_size
        else:
            every_row = grain.MapDataset.range(len(self)).map(self._load)
            elements, rows = every_row[share.host :: share.hosts], 1
        loaded = LoadedExamples(
            elements,
            share,
            identity={"records": len(self), "seed": self.planner.seed, "shuffle": 0},
            watch=self._watch,
            rows=rows,
            unit=share.batch_size,
        )
        if self._in_memory:
            return loaded
        return loaded.batch(share.batch_size, drop_remainder=True, batch_fn=stack)


class _RowLoader:
    """Row number to example. Errors become values: not every exception survives a process."""

    def __init__(
        self, source: records.Source, planner: Planner, transform: RowTransform, in_memory: bool
    ) -> None:
        self._parts = source, planner, transform, in_memory
        self._source, self._planner, self._transform, self._in_memory = self._parts
        self._plans: collections.OrderedDict[int, BatchPlan] = collections.OrderedDict()
        self._whole = transform.batch if isinstance(transform, BatchTransform) else None
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, Hashable], tuple[str, Any]] = {}
        self._bad: dict[int, Skipped] = {}

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Pickles only the arguments."""
        return _RowLoader, self._parts

    def __call__(self, index: int) -> Example | Redrawn | Crash:
        skipped: list[Skipped] = []
        row = None
        try:
            for row in itertools.islice(self._candidates(index), _MOST_REDRAWS):
                example = self._example(row, skipped)
                if example is not None:
                    return Redrawn(tuple(skipped), example) if skipped else example
        except Exception:
            number = "" if row is None else f", record number {row.record}"
            return Crash(f"planned row {index}{number}: {traceback.format_exc()}")
        return Redrawn(tuple(skipped), None)

    def batch(self, share: HostShare, number: int) -> Example | Redrawn | Crash:
        """This host's rows of a batch, stacked; row by row where a record cannot be used."""
        if self._whole is not None:
            try:
                plan = self._plan(number).part(share)
                names, read = zip(
                    *(self._read(record, plan.shape) for record in plan.record.tolist()),
                    strict=True,
                )
                return {**self._whole(read, plan), "id": np.array(names)}
            except DataError:
                pass
            except Exception:
                return Crash(f"planned batch {number}: {traceback.format_exc()}")
        size, rows, skipped = self._planner.batch_size, [], []
        for place in range(share.host, size, share.hosts):
            row = self(number * size + place)
            if isinstance(row, Crash):
                return row
            if isinstance(row, Redrawn):
                skipped += row.skipped
                row = row.example
            if row is None:
                return Redrawn(tuple(skipped), None)
            rows.append(row)
        try:
            example = stack(rows)
        except DataError as error:
            return Crash(f"planned batch {number}: {error}")
        return Redrawn(tuple(skipped), example)

    def shown(self, index: int) -> tuple[records.Record, Example]:
        """The record of a row, with what the row asks about it, and its arrays."""
        row = self._planned(index)
        record = self._source[row.record]
        read = self._transform.read(record, row.shape)
        return self._transform.described(record, row), self._transform(read, row)

    def _candidates(self, index: int) -> Iterator[Row]:
        yield self._planned(index)
        yield from self._planner.redraws(*self._place(index))

    def _place(self, index: int) -> tuple[int, int, int]:
        """Epoch, step, and place in the batch."""
        batch, place = divmod(index, self._planner.batch_size)
        return *divmod(batch, self._planner.batches_per_epoch), place

    def _planned(self, index: int) -> Row:
        epoch, step, place = self._place(index)
        plan = self._plan(index // self._planner.batch_size)
        return plan.row(place, (self._planner.seed, epoch, step, place))

    def _plan(self, batch: int) -> BatchPlan:
        """The plan of a batch, for which neighbouring rows in several threads ask."""
        with self._lock:
            if batch not in self._plans:
                epoch_step = divmod(batch, self._planner.batches_per_epoch)
                self._plans[batch] = self._planner.plan(*epoch_step)
                while len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
            return self._plans[batch]

    def _example(self, row: Row, skipped: list[Skipped]) -> Example | None:
        """A row's arrays; None if its record cannot be used, which is added to `skipped`."""
        name = ""
        try:
            if row.record not in self._bad:
                with pixel_budget.scope():
                    name, read = self._read(row.record, row.shape)
                    return {**self._transform(read, row), "id": name}
        except DataError as error:
            self._bad.setdefault(row.record, Skipped(row.record, name, str(error)))
        skipped.append(self._bad[row.record])
        return None

    def _read(self, number: int, shape: Hashable) -> tuple[str, Any]:
        """Id of a record and what was read of it.

        Raises:
          DataError: it cannot be used.
        """
        found = self._kept.get((number, shape))
        if found is not None:
            return found
        if number in self._bad:
            raise DataError(self._bad[number].reason)
        name = ""
        try:
            with pixel_budget.scope():
                record = self._source[number]
                name = record.id
                found = name, self._transform.read(record, shape)
        except DataError as error:
            self._bad[number] = Skipped(number, name, str(error))
            raise
        if self._in_memory:
            self._kept[number, shape] = found
        return found
