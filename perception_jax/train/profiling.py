"""Traces a few training steps with `jax.profiler`; XProf and TensorBoard show the result."""

from __future__ import annotations

import logging
import pathlib

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

    def before(self, step: int) -> None:
        """Starts the trace, if `step`, which is about to start, is the first to trace."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def after(self, step: int) -> None:
        """Writes the trace, if `step`, which is done, is the last."""
        if self._running and step == self._steps[-1]:
            self.close()
            _log.info("a trace up to step %d is in %s; see it with xprof", step, self._folder)

    def close(self) -> None:
        """Writes what was traced so far."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
