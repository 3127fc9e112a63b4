"""The position in the training data, stored in checkpoints for any number of processes.

A checkpoint's folder `data` has one JSON file per process: the state of that process's iterator
before the next batch. A run on as many processes takes its own file. On another number of
processes, the states of `data.loader` are one place in the global order; for the states of other
iterators, which do not say how many processes took turns, the batches so far are read again.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Awaitable, Mapping
from typing import Any

import jax

from perception_jax.errors import CheckpointError, PerceptionError

_log = logging.getLogger(__name__)


class PositionFile:
    """This process's file in the folder `data`, in orbax's protocol; `restore` reads it."""

    def __init__(self, state: Any) -> None:
        self._text = json.dumps(state, indent=4)

    async def save(self, directory: Any) -> Awaitable[None]:
        name = _name(jax.process_index(), jax.process_count())

        async def write() -> None:
            path = await directory.await_creation()
            (path / name).write_text(self._text, encoding="utf-8")

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        raise CheckpointError(f"{directory}: restores never ask orbax for these; see restore.")


def restore(directory: pathlib.Path, iterator: Any, *, written_by: int, batches: int) -> None:
    """Moves `iterator` to the saved position.

    Args:
      directory: the folder `data` of a checkpoint.
      iterator: at its beginning.
      written_by: number of processes that wrote the checkpoint.
      batches: how many were taken before it.

    Raises:
      CheckpointError: the files cannot be read, or the iterator does not take their state.
      DataError: the data or its order are not those of the run.
    """
    index, count = jax.process_index(), jax.process_count()
    if written_by == count:
        _set_state(iterator, _read(directory / _name(index, count)), directory)
        return
    states = [_read(directory / _name(i, written_by)) for i in range(written_by)]
    if all(_is_global(state) for state in states):
        # Processes that skipped records are some places ahead: nothing is left out, and at most
        # those few records come again.
        first = min(states, key=lambda state: state["position"])
        _set_state(iterator, first, directory)
    else:
        _log.warning(
            "the position in the data was saved by %d processes; this run has %d and reads the %d "
            "batches before it again to find it",
            written_by,
            count,
            batches,
        )
        for _ in range(batches):
            next(iterator)


def _is_global(state: Any) -> bool:
    """Whether it says how many processes took turns: then `set_state` finds it for any number."""
    return isinstance(state, Mapping) and {"position", "hosts"} <= state.keys()


def _set_state(iterator: Any, state: Any, directory: pathlib.Path) -> None:
    try:
        iterator.set_state(state)
    except PerceptionError:
        raise
    except Exception as error:  # iterators of any kind raise errors of any kind
        raise CheckpointError(
            f"the iterator of the training data does not take the position saved in {directory} "
            f"({type(error).__name__}: {error}). Resume with the data and the loader that wrote "
            "it, or start a new run in another workdir."
        ) from error


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"expected the position in the data in {path}, found none that can be read ({error})."
        ) from error


def _name(index: int, count: int) -> str:
    return f"process_{index}-of-{count}.json"
