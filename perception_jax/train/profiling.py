"""Traces a few training steps with `jax.profiler`; XProf and TensorBoard show the result."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable

import jax

_log = logging.getLogger(__name__)


class StepTrace:
    """Traces the steps from `first` on into a folder.

    A run that is resumed behind `first` traces what is left of these steps.
    """

    def __init__(self, folder: pathlib.Path, *, first: int, count: int) -> None:
        """`first`: 0 traces nothing."""
        self._folder = folder
        self._steps = range(first, first + count) if first else range(0)
        self._running = False

    def before(self, step: int, wait: Callable[[], None]) -> None:
        """Starts or ends the trace, if `step`, about to start, is the first in it or behind it.

        Args:
          wait: for the steps that were started before.
        """
        if (step in self._steps) == self._running:
            return
        wait()
        if self._running:
            self.close()
        else:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def close(self) -> None:
        """Writes what was traced so far."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            _log.info("traced steps are in %s; see them with xprof", self._folder)
