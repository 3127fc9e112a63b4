"""Signs of life between the processes of a run, so that none waits for one that is gone.

A process that dies leaves the others in a collective that may never end. Each process therefore
writes a count to the coordination service every few seconds and reads those of the others. If one
has not counted on for the agreed time, the others name it and end, with exit code 1.

JAX has such heartbeats too (`jax.distributed.initialize(heartbeat_timeout_seconds=…)`), but aborts
without the process's host and error; `distributed.initialize` sets their limit behind this one. If
process 0 dies, the coordination service dies with it and JAX ends the others at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the service has no public client

_log = logging.getLogger(__name__)

_PREFIX = "perception_jax/peers/"
_LEFT = "left"


@dataclasses.dataclass
class _Peer:
    """What is known of another process.

    Attributes:
      beat: the last count that it wrote, seen first at the time `at`.
      state: "" while it runs, `_LEFT` once it has ended well, else its error, seen since `failed`.
    """

    host: str
    beat: int
    at: float
    state: str
    failed: float


class Peers:
    """A context in which this process shows that it lives and watches the others.

    It does nothing for a single process.
    """

    def __init__(self, seconds: float, *, end: Callable[[int], Any] = os._exit) -> None:
        """Makes the context.

        Args:
          seconds: without a sign of life, or since an error, after which a process counts as gone.
          end: called with the exit code.
        """
        self._seconds, self._interval = seconds, min(5.0, seconds / 10)
        self._end = end
        self._index, self._count = jax.process_index(), jax.process_count()
        self._beat, self._state = 0, ""
        self._peers: dict[int, _Peer] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def __enter__(self) -> Peers:
        if self._count > 1:
            self._look()
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._count > 1:
            self._state = self._state or _LEFT
            self._stopped.set()
            self._thread.join()
            self._try_to_look()

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tells the others of an error inside, before anything else that may wait for them."""
        try:
            yield
        except BaseException as error:
            if self._count > 1:
                self._state = f"{type(error).__name__}: {error}"[:500]
                self._try_to_look()
                if isinstance(error, jax.errors.JaxRuntimeError):
                    self._await_verdict(error)
            raise

    def _await_verdict(self, error: Exception) -> None:
        """Waits to see whether an error inside a collective means that another process is gone."""
        seconds = self._seconds + 2 * self._interval
        _log.error(
            "%s\nWaiting up to %.0f s to see whether another process is gone.", error, seconds
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._all_have_ended():
            time.sleep(self._interval)

    def _all_have_ended(self) -> bool:
        return len(self._peers) == self._count - 1 and all(p.state for p in self._peers.values())

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            self._try_to_look()
            gone = self._gone()
            if gone:
                _log.critical(
                    "this run cannot go on: %s. Steps since the last checkpoint are lost. See the "
                    "logs of these processes, then start the same command on all of them again.",
                    "; ".join(gone),
                )
                logging.shutdown()
                if self._index == 0:  # the others lose the service with this process
                    time.sleep(2 * self._interval + 1)
                self._end(1)
                return

    def _try_to_look(self) -> None:
        try:
            self._look()
        except jax.errors.JaxRuntimeError as error:
            _log.warning("the coordination service does not answer: %s", error)

    def _look(self) -> None:
        client: Any = jax_distributed.global_state.client
        own = {"beat": self._beat, "state": self._state, "host": socket.gethostname()}
        self._beat += 1
        client.key_value_set(f"{_PREFIX}{self._index}", json.dumps(own), allow_overwrite=True)
        for key, text in client.key_value_dir_get(_PREFIX):
            index = int(key.rpartition("/")[2])
            if index != self._index:
                self._note(index, json.loads(text))

    def _note(self, index: int, found: dict[str, Any]) -> None:
        now, peer = time.monotonic(), self._peers.get(index)
        if peer is None:
            if not found["state"]:  # else it is what an earlier run left behind
                self._peers[index] = _Peer(**found, at=now, failed=now)
        elif found["beat"] != peer.beat:
            failed = peer.failed if peer.state else now
            self._peers[index] = _Peer(**found, at=now, failed=failed)

    def _gone(self) -> list[str]:
        """Describes the processes that have given no sign of life, or have failed, for too long.

        Once this process has an error itself, only the former: it ends by its own error.
        """
        now, found = time.monotonic(), []
        for index, peer in sorted(self._peers.items()):
            silent = now - peer.at
            failed = now - peer.failed if peer.state and not self._state else 0.0
            if peer.state != _LEFT and max(silent, failed) > self._seconds:
                why = (
                    f"failed ({peer.state})" if peer.state else f"was last seen {silent:.0f} s ago"
                )
                found.append(f"process {index} of {self._count} on {peer.host} {why}")
        return found
