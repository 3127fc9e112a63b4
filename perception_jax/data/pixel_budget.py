"""A limit on the pixels decoded at a time, which bounds the memory of loader threads.

A thread takes an image's pixels before it decodes them and gives them back when its scope ends, so
that what is made of the image counts too. Small images never wait for each other; one that alone is
above the budget waits until it is alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

BUDGET = 100_000_000
"""Pixels of all threads of a process; each takes about 11 bytes during decoding."""

_free = threading.Condition()
_taken = 0


class _ThreadUsage(threading.local):
    """Pixels reserved by this thread, and its nesting depth of scopes."""

    pixels = 0
    depth = 0


_held = _ThreadUsage()


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Releases the pixels reserved inside at the end of the thread's outermost scope."""
    global _taken
    _held.depth += 1
    try:
        yield
    finally:
        _held.depth -= 1
        if not _held.depth and _held.pixels:
            with _free:
                _taken -= _held.pixels
                _held.pixels = 0
                _free.notify_all()


def take(pixels: int) -> None:
    """Waits until the pixels fit into the budget and reserves them; only inside a scope.

    A thread that has some already does not wait: it could wait for itself.
    """
    global _taken
    with _free:
        if not _held.pixels:
            _free.wait_for(lambda: _taken == 0 or _taken + pixels <= BUDGET)
        _taken += pixels
        _held.pixels += pixels
