"""Loading ahead with threads or processes."""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import grain
from absl import flags

from perception_jax.data import worker_watch

_THREADS = 4
_THREADS_BUFFER = 64
_THREADS_IN_WORKER = grain.ReadOptions(num_threads=1, prefetch_buffer_size=16)
_WORKER_BUFFER = 16
_GRACE_SECONDS = 60.0
# Arrays come from workers through pipes. Shared memory, grain's default, is 64 MB in a container
# unless somebody knows to ask for more, and what is in flight when an iterator closes leaks.
_THROUGH_PIPES = grain.experimental.DatasetOptions(min_shm_size=2**62)


def configure_grain() -> None:
    """Configures grain for use in any program; call it before creating an iterator.

    It reads absl flags, which absl forbids where none were parsed; and it appends a remark on
    tracebacks to every error's message, ours included, unless a flag says otherwise.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    if not flags.FLAGS["grain_py_traceback_filtering"].present:
        grain.config.update("py_traceback_filtering", "off")


def prefetch(elements: grain.MapDataset, num_workers: int, rows: int = 1) -> ClosableIterator:
    """Yields elements in order, computed ahead.

    Args:
      elements: picklable if there are workers.
      num_workers: 0 for threads of this process.
      rows: examples in an element: of large ones threads keep fewer.
    """
    if num_workers == 0:
        ahead = max(_THREADS, _THREADS_BUFFER // rows)
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=ahead)
        return ClosableIterator(iter(elements.to_iter_dataset(options)))
    options = grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=_WORKER_BUFFER
    )
    ahead = grain.experimental.WithOptionsIterDataset(
        elements.to_iter_dataset(_THREADS_IN_WORKER), _THROUGH_PIPES
    )
    stream = iter(ahead.mp_prefetch(options, worker_init_fn=_start_worker))
    return ClosableIterator(stream, num_workers)


class ClosableIterator(Iterator[Any]):
    """The elements of `stream`, with supervision of the loading processes."""

    def __init__(self, stream: grain.DatasetIterator, num_workers: int = 0) -> None:
        self._stream = stream
        self._starting = num_workers
        self._first: collections.deque[Any] = collections.deque()
        self._watch = worker_watch.WorkerWatch() if num_workers else None

    def __next__(self) -> Any:
        if self._watch is None:
            return next(self._stream)
        if self._starting:
            self._start()
        if self._first:
            return self._first.popleft()
        with self._watch.waiting():
            return next(self._stream)

    def _start(self) -> None:
        """The processes start while their first elements are requested, one of each in turn."""
        count, self._starting = self._starting, 0
        _start_tracker()
        with self._watch.waiting(), _main_module_hidden():
            self._first.extend(itertools.islice(self._stream, count))

    def close(self) -> None:
        """Stops threads and processes; those that do not end by themselves are killed."""
        if self._watch is None:
            self._stream.close()
            return
        with self._watch.closing():
            # grain first reads what the workers have sent. If one is killed while it sends, that
            # read never ends: this process holds the other end of the pipe too.
            closing = threading.Thread(target=self._stream.close, daemon=True)
            closing.start()
            closing.join(2 * worker_watch.CLOSE_SECONDS)


def _start_tracker() -> None:
    """Starts Python's resource tracker with SIGHUP blocked, as it blocks SIGINT and SIGTERM itself.

    Otherwise a SIGHUP to the process group ends it, and the one that Python then starts prints a
    traceback for each semaphore that it does not know.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP,))
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keeps a starting process from importing the main script again.

    The standard "spawn" does that, so a script without an `if __name__ == "__main__"` guard would
    run a second time, and one with a guard would still import all it needs, JAX included. What
    workers do need of the main script reaches them by value (grain uses cloudpickle).
    """
    main = sys.modules["__main__"]
    missing = object()
    saved = {name: getattr(main, name, missing) for name in ("__spec__", "__file__")}
    main.__spec__ = None
    if saved["__file__"] is not missing:
        del main.__file__
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is not missing:
                setattr(main, name, value)


def _start_worker(index: int, count: int) -> None:
    """Runs first in each worker: signals are the main process's, and without it nobody stays."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end_later)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _end_later(number: int, frame: types.FrameType | None) -> None:
    """A signal to the whole process group reaches workers too, and the main process, which first
    finishes its step, still needs their elements; it then ends them itself."""
    del number, frame
    last = threading.Timer(_GRACE_SECONDS, os._exit, [1])
    last.daemon = True
    last.start()


def _exit_with_parent() -> None:
    """Ends the worker when the main process is gone, however it went (kill -9 included)."""
    multiprocessing.parent_process().join()
    os._exit(1)
