"""Records that cannot be used: one rule for training and evaluation.

Such a record (its source, decoding or transform raises `DataError`) is skipped, counted and named
in the log. More than `max_bad_fraction` of the records stop the run; one is always tolerated,
unless the share is 0.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator

import numpy as np

from perception_jax.data import images, pixel_budget, records
from perception_jax.data.sources.combine import Subset
from perception_jax.errors import ConfigError, DataError

MAX_BAD_FRACTION = 0.01
"""Default share of unusable records that is tolerated."""

OnSkip = Callable[["Skipped"], None]
"""Callback for each skipped record."""

_LOGGER = logging.getLogger(__name__)
_JUDGED_AFTER = 1000
"""Records after which the share of bad ones is judged; a smaller source after one pass."""


@dataclasses.dataclass(frozen=True, slots=True)
class Skipped:
    """A record that could not be used.

    Attributes:
      index: in the source.
      id: the record's, or "" if the source could not even say that.
      reason: the message of the `DataError`.
    """

    index: int
    id: str
    reason: str

    def __str__(self) -> str:
        return f"record {self.id or f'number {self.index}'!r}: {self.reason}"


class Watch:
    """Logs each bad record once and raises when they are too many. One per pass or iterator."""

    def __init__(
        self,
        count: int,
        max_bad_fraction: float = MAX_BAD_FRACTION,
        on_skip: OnSkip | None = None,
    ) -> None:
        """Starts counting skipped records.

        Args:
          count: of different records that there are to see.
          max_bad_fraction: see the module.
          on_skip: called once per record that is skipped, besides the log.

        Raises:
          ConfigError: a share outside [0, 1].
        """
        if not 0 <= max_bad_fraction <= 1:
            raise ConfigError(
                f"max_bad_fraction: expected a share in [0, 1], found {max_bad_fraction}."
            )
        self._count, self._max_fraction, self._on_skip = count, max_bad_fraction, on_skip
        self._seen = 0
        self._bad: set[int] = set()
        self._named: set[str | int] = set()

    def fresh(self) -> Watch:
        """Returns a new watch with the same settings, for another pass."""
        return Watch(self._count, self._max_fraction, self._on_skip)

    def check(self, skipped: Skipped | None) -> None:
        """Takes note of one more record.

        Args:
          skipped: what is wrong with it; None for a sound one.

        Raises:
          DataError: too many are bad.
        """
        self._seen += 1
        if skipped is not None and skipped.index not in self._bad:
            self._bad.add(skipped.index)
            self._name(skipped)
            self._judge(skipped)
        elif self._seen == min(self._count, _JUDGED_AFTER):
            self._judge(None)

    def _name(self, skipped: Skipped) -> None:
        """Once per id: a record can stand at many places, e.g. once for each of its objects."""
        key = skipped.id or skipped.index
        if key in self._named:
            return
        self._named.add(key)
        _LOGGER.warning("skipped %s", skipped)
        if self._on_skip is not None:
            self._on_skip(skipped)

    def _judge(self, latest: Skipped | None) -> None:
        seen, bad = min(self._seen, self._count), len(self._bad)
        if self._max_fraction > 0 and seen < min(self._count, _JUDGED_AFTER):
            return
        allowed = max(1, int(self._max_fraction * seen)) if self._max_fraction > 0 else 0
        if bad > allowed or bad == seen:
            example = f", the latest {latest}" if latest else " (each is named in the log)"
            raise DataError(
                f"{bad} of {seen} records could not be used, more than the allowed share of "
                f"{self._max_fraction:g}{example}. Repair the data, or raise max_bad_fraction."
            )


def sound_records(source: records.Source, watch: Watch) -> Iterator[tuple[int, records.Record]]:
    """Number and record of all that the source can read, in order."""
    for index in range(len(source)):
        try:
            record = source[index]
        except DataError as error:
            watch.check(Skipped(index, "", str(error)))
        else:
            watch.check(None)
            yield index, record


def usable(
    source: records.Source,
    *,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    check: Callable[[records.Record], None] | None = None,
) -> records.Source:
    """The records of a source whose images can be decoded: reads and decodes all, in threads.

    For what must have each of its records later: an evaluation, images held in memory.

    Args:
      max_bad_fraction: see the module.
      check: raises `DataError` for a record that cannot be used for another reason.

    Returns:
      The source itself if all can be used.

    Raises:
      DataError: too many cannot, or there are none.
    """
    watch, good = Watch(len(source), max_bad_fraction), []

    def find_fault(index: int) -> Skipped | None:
        name = ""
        try:
            with pixel_budget.scope():
                record = source[index]
                name = record.id
                images.decode(record.image, name=name)
                if check is not None:
                    check(record)
        except DataError as error:
            return Skipped(index, name, str(error))
        return None

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        for index, fault in enumerate(pool.map(find_fault, range(len(source)))):
            watch.check(fault)
            if fault is None:
                good.append(index)
    finally:
        pool.shutdown(cancel_futures=True)
    if not good:
        raise DataError(f"{type(source).__name__}: the source has no records.")
    return source if len(good) == len(source) else Subset(source, np.array(good, np.int64))
