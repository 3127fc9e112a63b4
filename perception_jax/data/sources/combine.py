"""Sources made of other sources: parts of one, one in memory, several in fixed proportions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

from perception_jax.data.records import Record, Source
from perception_jax.errors import ConfigError

FIELDS = tuple(field.name for field in dataclasses.fields(Record))
"""Names of the fields of a record."""


class Subset:
    """Chosen records of a source, in the given order."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray):
        """Selects records of a source.

        Args:
          indices: into `source`.

        Raises:
          ConfigError: an index outside the source.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(source)):
            raise ConfigError(
                f"subset: expected indices in [0, {len(source)}), found {indices.min()} to "
                f"{indices.max()}."
            )
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self._source[int(self._indices[index])]


class Mapped:
    """The records of a source, each changed by a function."""

    def __init__(self, source: Source, change: Callable[[Record], Record]):
        """Reads nothing. Args: change: of one record; picklable where processes load."""
        self._source, self._change = source, change

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return self._change(self._source[index])


class InMemory:
    """The records of a source, each read once per process.

    Worth it where a record takes longer to make than to use and is seen again: scenes over several
    epochs, remote files. Loading processes each fill their own memory, so threads (`workers=0`)
    suit it better.
    """

    def __init__(self, source: Source, *, keep: Collection[str] = FIELDS):
        """Reads all records of a source.

        Args:
          keep: fields that stay in addition to "id" and "images"; the others become empty.

        Raises:
          ConfigError: a field that records do not have.
        """
        if unknown := sorted(set(keep) - set(FIELDS)):
            raise ConfigError(f"keep: expected fields out of {FIELDS}, found {unknown}.")
        self._source = source
        self._keep = frozenset({"id", "images", *keep})
        self._records: dict[int, Record] = {}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._records.get(index)
        if record is None:
            full = self._source[index]
            record = Record(**{name: getattr(full, name) for name in FIELDS if name in self._keep})
            self._records[index] = record
        return record

    def __getstate__(self) -> dict[str, object]:
        """Pickles without the records, which another process reads itself."""
        return {**self.__dict__, "_records": {}}


class Mixture:
    """Several sources in fixed proportions.

    Of every `sum(shares)` neighbouring records `shares[k]` come from `sources[k]`; each source is
    read in order, and from its start again when it ends.
    """

    def __init__(self, sources: Sequence[Source], shares: Sequence[int], *, length: int):
        """Mixes several sources.

        Args:
          shares: positive whole numbers.
          length: number of records of the mixture.

        Raises:
          ConfigError: no source, an empty one, or shares that do not fit.
        """
        fits = len(sources) == len(shares) > 0 and all(share > 0 for share in shares)
        if not fits or any(len(source) == 0 for source in sources):
            raise ConfigError(
                f"mixture: expected sources with records and one positive share each, found "
                f"lengths {[len(source) for source in sources]} and shares {list(shares)}."
            )
        self._sources, self._shares, self._length = list(sources), list(shares), length
        self._slots = np.repeat(np.arange(len(shares)), shares)
        self._offsets = np.concatenate([np.arange(share) for share in shares])

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._length:
            raise IndexError(f"record {index} of {self._length}")
        turn, slot = divmod(index, len(self._slots))
        which = int(self._slots[slot])
        source = self._sources[which]
        return source[(turn * self._shares[which] + int(self._offsets[slot])) % len(source)]


def split(source: Source, every: int) -> tuple[Subset, Subset]:
    """Two parts without common records: all but each `every`-th one, and each `every`-th one.

    Raises:
      ConfigError: fewer than `every` records, or `every` below 2.
    """
    if every < 2 or len(source) < every:
        raise ConfigError(
            f"split: expected at least {max(every, 2)} records to keep every {every}-th apart, "
            f"found {len(source)}."
        )
    test = np.arange(every - 1, len(source), every)
    return Subset(source, np.setdiff1d(np.arange(len(source)), test)), Subset(source, test)
