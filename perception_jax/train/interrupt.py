"""SIGTERM and the first Ctrl-C ask the loop to finish its step, save and return."""

from __future__ import annotations

import signal
import sys
import threading
import types


class Interrupt:
    """A context in which SIGTERM and SIGINT set `requested`; a second Ctrl-C stops at once.

    Handlers are a matter of the main thread; in any other thread this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint …"
        if number == signal.SIGINT:
            text += " (Ctrl-C again stops at once)"
        print(text, file=sys.stderr)
