"""Signals that end a run after the current step and a save."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that end a run."""


class Stopped(BaseException):  # not an Exception: code on the way must not take it for an error
    """Raised by a signal inside `Interrupt.leaving`: leaves an evaluation or a wait for data."""


class Interrupt:
    """A context in which SIGTERM, SIGINT and SIGHUP set `requested`; a second Ctrl-C stops at once.

    A SIGHUP that was ignored stays so (`nohup`). Handlers are a matter of the main thread; in any
    other thread this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}
        self._patience = math.inf
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._forget_timer()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def leaving(self, patience: float = 0.0) -> Iterator[None]:
        """A part of the run that a signal may leave by `Stopped`.

        Args:
          patience: seconds from the signal until then; infinity never leaves.
        """
        if not self._before:
            yield
            return
        self._patience = patience
        try:
            if self.requested:
                self._leave_in_time()
            yield
        finally:
            self._patience = math.inf
            self._forget_timer()

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        again, self.requested = self.requested, True
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not again:
            _say(number)
        self._leave_in_time(waited=again)

    def _leave_in_time(self, *, waited: bool = False) -> None:
        if self._patience == 0 or (waited and math.isfinite(self._patience)):
            raise Stopped
        if math.isfinite(self._patience):
            self._timer = threading.Timer(self._patience, os.kill, (os.getpid(), signal.SIGTERM))
            self._timer.daemon = True
            self._timer.start()

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _say(number: int) -> None:
    text = f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint …"
    if number == signal.SIGINT:
        text += " (Ctrl-C again stops at once)"
    # The terminal may be gone, or the signal may have come in the middle of another print.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        print(text, file=sys.stderr)
