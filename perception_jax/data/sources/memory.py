"""A source kept in memory after its first reading, for records that are costly to make."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from perception_jax.data.records import Record, Source
from perception_jax.errors import ConfigError

FIELDS = tuple(field.name for field in dataclasses.fields(Record))
"""Names of the fields of a record."""


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
