"""From a source and a transform to batches: a `grain.IterDataset` with resumable iterators.

The order of the pipeline, and what each place in it buys:

    record numbers → shuffle → repeat → load (read, decode, transform; own random generator per
    element) → host shard → worker processes → skip what could not be used → batch

- Shuffling by index costs nothing, so hosts share one global order and take every n-th of it: the
  global batch and each element's random numbers are the same on 1 host and on 8.
- Batching comes last, in the main process, so they are also the same for every worker count.
- The state of an iterator is its place in that order. It does not depend on the worker count or
  batch size, and is found again without reading what came before.

A record that cannot be used (its source, decoding or transform raises `DataError`) is skipped,
counted and named in the log; too many stop the run (see `skipping`). Large images wait for each
other so that those in memory stay within `pixel_budget`.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np

from perception_jax.data import pixel_budget, records, workers
from perception_jax.data.skipping import MAX_BAD_FRACTION, OnSkip, Skipped, Watch
from perception_jax.errors import ConfigError, DataError

Example = dict[str, Any]
"""One example: arrays of fixed shapes by name, and "id", the record's id."""

_LOGGER = logging.getLogger(__name__)


@runtime_checkable
class RecordTransform(Protocol):
    """Picklable, thread-safe function from a record and random numbers to arrays, deterministic."""

    def __call__(self, record: records.Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns arrays whose names, shapes and dtypes are the same for every record."""


def make_loader(
    source: records.Source,
    transform: RecordTransform,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    epochs: int | None = None,
    num_workers: int = 0,
    host: tuple[int, int] | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    on_skip: OnSkip | None = None,
) -> grain.IterDataset:
    """Makes the training loader: this host's part of each global batch, full batches only.

    Args:
      source: random access to records.
      transform: record to arrays; see `RecordTransform`.
      batch_size: of all hosts together.
      seed: of the order and of every element's random numbers, in [0, 2³²).
      shuffle: a new order each epoch, or the source's own.
      epochs: passes over the source; None never ends (several hosts need that: records skipped on
        one host only would end its epoch early).
      num_workers: processes that load; 0 loads in threads of this process.
      host: index and number of hosts; None asks JAX.
      max_bad_fraction: raise if more than this share of the records cannot be used; judged after
        1,000 records or one pass. One bad record is always tolerated, unless the share is 0.
      on_skip: called once per record that is skipped, besides the log.

    Returns:
      An `IterDataset` of dicts: arrays with a leading batch axis, and "id" (numpy strings). Its
      iterators have `get_state` and `set_state`; close those that use workers.

    Raises:
      ConfigError: sizes that do not fit together.
      DataError: an empty source. While iterating: too many bad records, arrays that do not stack,
        or an error in the transform other than `DataError`, with its traceback and the record's id.
    """
    place = host_share(batch_size, num_workers, host)
    count = _count(source)
    if epochs is not None and epochs < 1:
        raise ConfigError(f"epochs: expected at least 1 or None, found {epochs}.")
    if epochs is not None and count * epochs < batch_size:
        raise DataError(
            f"{count} records × {epochs} epochs do not fill one batch of {batch_size}. "
            "Lower batch_size or raise epochs."
        )
    if count < batch_size:
        _LOGGER.warning(
            "%d records are fewer than the %d of a batch: every batch has some of them more than "
            "once. Lower batch_size.",
            count,
            batch_size,
        )
    order = grain.MapDataset.range(count)
    if shuffle:
        order = order.shuffle(seed=seed)
    order = order.repeat(epochs)
    if epochs is not None:
        order = order[: len(order) // batch_size * batch_size]
    examples = LoadedExamples(
        order.random_map(_Load(source, transform, count), seed=seed)[place.host :: place.hosts],
        place,
        identity={"records": count, "seed": seed, "shuffle": int(shuffle)},
        watch=Watch(count, max_bad_fraction, on_skip),
    )
    return examples.batch(place.batch_size, drop_remainder=True, batch_fn=stack)


def make_eval_loader(
    source: records.Source,
    transform: RecordTransform,
    *,
    batch_size: int,
    seed: int = 0,
    num_workers: int = 0,
    host: tuple[int, int] | None = None,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    on_skip: OnSkip | None = None,
) -> grain.IterDataset:
    """Makes the evaluation loader: one pass in the source's order, each record exactly once.

    As `make_loader`, except that every host gives the same number of batches, all full: "valid"
    (bool[B]) is False for rows that fill up (their id is "") or stand for a skipped record.
    """
    place = host_share(batch_size, num_workers, host)
    count = _count(source)
    load = _Load(source, transform, count)
    padded = -(-count // batch_size) * batch_size
    elements = grain.MapDataset.range(padded).random_map(load, seed=seed)
    examples = LoadedExamples(
        elements[place.host :: place.hosts],
        place,
        identity={"records": count, "seed": seed, "shuffle": 0},
        watch=Watch(-(-count // place.hosts), max_bad_fraction, on_skip),
        keep_places=True,
    )
    return examples.batch(place.batch_size, batch_fn=functools.partial(_stack_valid, load))


def stack(examples: Sequence[Example]) -> Example:
    """Stacks examples along a new first axis.

    Raises:
      DataError: names or shapes differ.
    """
    first = examples[0]
    for example in examples[1:]:
        if example.keys() != first.keys():
            raise DataError(
                f"records {first['id']!r} and {example['id']!r}: expected the same names from the "
                f"transform, found {sorted(first)} and {sorted(example)}."
            )
        for name, value in example.items():
            if np.shape(value) != np.shape(first[name]):
                raise DataError(
                    f"records {first['id']!r} and {example['id']!r}: expected one shape for "
                    f"{name!r}, found {np.shape(first[name])} and {np.shape(value)}. Make the "
                    "transform pad to a fixed size."
                )
    return {name: np.array([example[name] for example in examples]) for name in first}


@runtime_checkable
class Examples(Protocol):
    """Training examples by index, for inspection."""

    @property
    def record_count(self) -> int:
        """Number of records that the examples are made of."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> tuple[records.Record, Example]:
        """A record and its arrays; raises `DataError` if it cannot be used."""


@dataclasses.dataclass(frozen=True, slots=True)
class RecordExamples:
    """The records of a source with the arrays that a transform makes of them.

    Attributes:
      seed: with the index, of the transform's random numbers.
    """

    source: records.Source
    transform: RecordTransform
    seed: int = 0

    @property
    def record_count(self) -> int:
        """Number of records of the source."""
        return len(self.source)

    def __len__(self) -> int:
        return self.record_count

    def __getitem__(self, index: int) -> tuple[records.Record, Example]:
        record = self.source[index]
        return record, self.transform(record, np.random.default_rng([self.seed, index]))


@dataclasses.dataclass(frozen=True, slots=True)
class HostShare:
    """Position of this loader in the job; `batch_size` is this host's."""

    host: int
    hosts: int
    batch_size: int
    num_workers: int


def host_share(batch_size: int, num_workers: int, host: tuple[int, int] | None) -> HostShare:
    """Computes which part of the global batches this host loads.

    Args:
      host: index and number of hosts; None asks JAX.

    Raises:
      ConfigError: sizes that do not fit together.
    """
    index, hosts = host or (jax.process_index(), jax.process_count())
    if not 0 <= index < hosts:
        raise ConfigError(f"host: expected an index below the count, found {index} of {hosts}.")
    if batch_size < 1 or batch_size % hosts:
        raise ConfigError(
            f"batch_size: expected a positive multiple of the {hosts} hosts, found {batch_size}."
        )
    if num_workers < 0:
        raise ConfigError(f"num_workers: expected 0 or more, found {num_workers}.")
    return HostShare(index, hosts, batch_size // hosts, num_workers)


def _count(source: records.Source) -> int:
    if not len(source):
        raise DataError(f"{type(source).__name__}: the source has no records.")
    return len(source)


@dataclasses.dataclass(frozen=True, slots=True)
class Crash:
    """An error of the program rather than of the data, passed from a worker to the main process."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Redrawn:
    """An example, or a stack of them, with replacements of planned records that cannot be used.

    Attributes:
      skipped: these records.
      example: with the replacements; None if there is none for a place.
    """

    skipped: tuple[Skipped, ...]
    example: Example | None


class _Padding:
    """Stands for a record behind the end of the source."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Load:
    """Record number to example. Errors become values: not every exception survives a process."""

    source: records.Source
    transform: RecordTransform
    count: int

    def __call__(
        self, index: int, rng: np.random.Generator
    ) -> Example | Skipped | Crash | _Padding:
        if index >= self.count:
            return _Padding()
        name = ""
        try:
            with pixel_budget.scope():
                record = self.source[index]
                name = record.id
                return {**self.transform(record, rng), "id": name}
        except DataError as error:
            return Skipped(index, name, str(error))
        except Exception:
            return Crash(f"record {name or f'number {index}'!r}: {traceback.format_exc()}")


class LoadedExamples(grain.IterDataset):
    """This host's examples in order, loaded ahead by threads or worker processes."""

    def __init__(
        self,
        elements: grain.MapDataset,
        place: HostShare,
        *,
        identity: Mapping[str, int],
        watch: Watch,
        keep_places: bool = False,
        rows: int = 1,
        unit: int = 1,
    ) -> None:
        """Configures the loading of examples.

        Args:
          elements: those of this host.
          keep_places: also yield what stands for a bad or missing record.
          rows: examples in an element, stacked, if more than 1: where an example takes less time
            than handing it over.
          unit: examples that are never separated: a saved position is rounded down to it.
        """
        super().__init__()
        self.elements, self.place, self.identity, self.watch = elements, place, identity, watch
        self.keep_places, self.rows, self.unit = keep_places, rows, unit

    def __iter__(self) -> _ExampleIterator:
        workers.configure_grain()
        return _ExampleIterator(self)

    def __str__(self) -> str:
        return f"LoadedExamples(host={self.place.host}/{self.place.hosts})"


class _ExampleIterator(grain.DatasetIterator):
    def __init__(self, examples: LoadedExamples) -> None:
        super().__init__()
        self._examples = examples
        self._watch = examples.watch.fresh()
        self._position = 0
        self._stream: workers.ClosableIterator | None = None

    def __next__(self) -> Example | Skipped | _Padding:
        self._assert_not_closed()
        while True:
            self.start_prefetch()
            element = next(self._stream)
            self._position += self._examples.rows
            if isinstance(element, Crash):
                raise DataError(f"the transform failed on {element.text}")
            if isinstance(element, Redrawn):
                element = self._accept(element)
            if not isinstance(element, _Padding):
                bad = element if isinstance(element, Skipped) else None
                for _ in range(self._examples.rows):
                    self._watch.check(bad)
            if self._examples.keep_places or isinstance(element, dict):
                return element

    def _accept(self, redrawn: Redrawn) -> Example:
        for skipped in redrawn.skipped:
            self._watch.check(skipped)
        if redrawn.example is None:
            raise DataError(
                f"none of {len(redrawn.skipped)} records that may take one place of a batch can be "
                f"used, the last {redrawn.skipped[-1]} Repair the data."
            )
        return redrawn.example

    def start_prefetch(self) -> None:
        if self._stream is None:
            rows = self._examples.rows
            rest = self._examples.elements[self._position // rows :]
            self._stream = workers.prefetch(rest, self._examples.place.num_workers, rows)

    def get_state(self) -> dict[str, Any]:
        place = self._examples.place
        return {"position": self._position, "hosts": place.hosts, **self._examples.identity}

    def set_state(self, state: dict[str, Any]) -> None:
        place = self._examples.place
        if set(state) == {"next_index"}:  # of data in memory, which once counted batches
            rows = state["next_index"] * place.batch_size
            state = {"position": rows, "hosts": place.hosts, **self._examples.identity}
        found = {name: state.get(name) for name in self._examples.identity}
        if found != self._examples.identity:
            raise DataError(
                f"the saved position in the data belongs to {found}, this run has "
                f"{dict(self._examples.identity)}. Resume with the same data and seed."
            )
        # On another number of hosts: the same place in the global order.
        position = state["position"] * state["hosts"] // place.hosts
        self._position = position // self._examples.unit * self._examples.unit
        self._close_stream()

    def close(self) -> None:
        super().close()
        self._close_stream()

    def __str__(self) -> str:
        return f"ExampleIterator({self._examples})"

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _stack_valid(load: _Load, elements: Sequence[Example | Skipped | _Padding]) -> Example:
    """Stacks, with a copy of a good example in the place of each bad or missing one."""
    valid = np.array([isinstance(element, dict) for element in elements])
    filler = next((e for e in elements if isinstance(e, dict)), None) or _any_example(load)
    rows = [
        element if isinstance(element, dict) else {**filler, "id": getattr(element, "id", "")}
        for element in elements
    ]
    return {**stack(rows), "valid": valid}


def _any_example(load: _Load) -> Example:
    """For a batch of nothing but padding: what the arrays of an example look like."""
    for index in range(load.count):
        element = load(index, np.random.default_rng(0))
        if isinstance(element, dict):
            return element
    raise DataError(f"none of the {load.count} records could be used. Repair the data.")
