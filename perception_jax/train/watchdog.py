"""Reports a step that does not advance: in the log, and where the threads are in a file."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import logging
import pathlib
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

_log = logging.getLogger(__name__)

_LEAST_SECONDS = 60.0
_TIMES_MEDIAN = 20


class Watchdog:
    """A context in which `advanced` is to be called after each step; a report stops nothing."""

    def __init__(self, folder: pathlib.Path, seconds: float) -> None:
        """Makes a watchdog.

        Args:
          folder: for the files with stack traces.
          seconds: without a step until a report; 0 for 20 times the median step, at least 60 s.
        """
        self._folder, self._seconds = folder, seconds
        self._step, self._since = 0, -1.0
        self._durations: collections.deque[float] = collections.deque(maxlen=64)
        self._reported = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped.set()
        self._thread.join()

    def advanced(self, step: int) -> None:
        """Notes that `step` is done. The first call begins the watch: compilation may take long."""
        now = time.monotonic()
        if self._since >= 0:
            self._durations.append(now - self._since)
        if self._reported:
            _log.warning("step %d is done, %.0f s after the one before", step, now - self._since)
        self._step, self._reported, self._since = step, 0.0, now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A part of the run that is no step, such as an evaluation; the next step ends it."""
        self._since = -1.0
        yield

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._limit() / 10)):
            since = self._since
            waited = time.monotonic() - since
            if since >= 0 and waited > max(self._limit(), 2 * self._reported):
                self._reported = waited
                self._report(waited)

    def _limit(self) -> float:
        if self._seconds:
            return self._seconds
        usual = statistics.median(self._durations.copy()) if self._durations else 0.0
        return max(_LEAST_SECONDS, _TIMES_MEDIAN * usual)

    def _report(self, waited: float) -> None:
        path = self._folder / f"stalled_step_{self._step + 1}_host_{jax.process_index()}.txt"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"{path} has where its threads are"
        except OSError as error:
            where = f"where its threads are could not be written ({error})"
        _log.warning(
            "step %d has not ended for %.0f s (a step takes %.2f s); this process goes on; %s. "
            "Look for a process that waits for data, or compare the files of all hosts.",
            self._step + 1,
            waited,
            statistics.median(self._durations.copy()) if self._durations else float("nan"),
            where,
        )
