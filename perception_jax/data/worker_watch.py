"""Detects loading processes that are stopped, stuck or dead, so that the program does not hang.

A process that gives nothing is killed; the wait for its element then ends with one error that says
why. A program that loads in threads cannot be helped so: a signal ends its wait.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import pathlib
import signal
import threading
import time
from collections.abc import Iterator

from perception_jax.errors import DataError

STOPPED_SECONDS = 30.0
"""Seconds that an awaited worker may be stopped (SIGSTOP, Ctrl-Z in another shell)."""
STUCK_SECONDS = 900.0
"""Seconds to wait for one element."""
REMIND_SECONDS = 60.0
"""Seconds after which waiting is logged, once per wait."""
CLOSE_SECONDS = 5.0
"""Seconds that workers may take to end after a request."""

_POLL_SECONDS = 1.0
_GRAIN_S = "grain-process-prefetch"

_log = logging.getLogger(__name__)


class WorkerWatch:
    """Watches grain's loading processes while the program waits for an element."""

    def __init__(self) -> None:
        self._others = {process.pid for process in multiprocessing.active_children()}
        self._since: float | None = None
        self._verdict = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="worker-watch")
        self._thread.start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for one element.

        Raises:
          DataError: a worker ended, or was ended because it gave nothing.
        """
        self._since = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise DataError(
                f"{self._verdict or _why_it_ended(str(error))} Run the same command again to "
                "resume "
                "from the newest checkpoint; with workers=0 the data are loaded in threads."
            ) from None
        finally:
            self._since = None

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Around the end of the workers: after `CLOSE_SECONDS` those that remain are killed."""
        last = threading.Timer(CLOSE_SECONDS, self._kill)
        last.daemon = True
        last.start()
        try:
            yield
        finally:
            last.cancel()
            self._ended.set()

    def _look(self) -> None:
        stopped: dict[int, float] = {}
        reminded = None
        while not self._ended.wait(_POLL_SECONDS):
            since, now = self._since, time.monotonic()
            if since is None:
                stopped.clear()
                continue
            workers = self._workers()
            # Counted from when this thread sees it: after a Ctrl-Z of the whole job, both go on.
            stopped = {pid: stopped.get(pid, now) for pid in workers if _is_stopped(pid)}
            still = [pid for pid, seen in stopped.items() if now - seen > STOPPED_SECONDS]
            if still:
                self._verdict = (
                    f"a loading process (pid {still[0]}) was stopped for {STOPPED_SECONDS:.0f} s "
                    "(SIGSTOP) while its data were waited for; it was ended."
                )
                self._kill()
            elif now - since > STUCK_SECONDS:
                self._verdict = (
                    f"the loading processes gave nothing for {STUCK_SECONDS:.0f} s and were ended: "
                    "a file that never answers (a named pipe, a dead network disk), or a record "
                    "that takes very long."
                )
                self._kill()
            elif now - since > REMIND_SECONDS and reminded != since:
                reminded = since
                _log.warning(
                    "waiting for data for %d s; loading processes: %s",
                    now - since,
                    ", ".join(map(str, workers)),
                )

    def _workers(self) -> list[int]:
        return [
            process.pid
            for process in multiprocessing.active_children()
            if process.pid not in self._others and process.name.startswith(_GRAIN_S)
        ]

    def _kill(self) -> None:
        for process in multiprocessing.active_children():
            if process.pid in self._workers():
                process.kill()


def _is_stopped(pid: int) -> bool:
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended, or there is no /proc here
        return False
    return fields[0] in ("T", "t")


def _why_it_ended(text: str) -> str:
    """Describes grain's message, which gives the exit code: -N is signal N."""
    code = text.partition("exit code ")[2].partition(".")[0]
    if code.startswith("-") and code[1:].isdecimal():
        number = int(code[1:])
        with contextlib.suppress(ValueError):
            name = signal.Signals(number).name
            memory = " (often the system's, for want of memory)" if name == "SIGKILL" else ""
            return f"a loading process was ended by {name}{memory}."
    return f"a loading process ended unexpectedly (exit code {code or 'unknown'})."
