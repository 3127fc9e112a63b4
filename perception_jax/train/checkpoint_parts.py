"""What a checkpoint consists of, in orbax's protocol for saving (`StatefulCheckpointable`)."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from perception_jax.errors import CheckpointError
from perception_jax.files import write_whole
from perception_jax.train import integrity


class JsonFiles:
    """JSON values by file name, which are read without orbax."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._texts = {
            name: json.dumps(value, indent=1, default=str) for name, value in values.items()
        }

    async def save(self, directory: Any) -> Awaitable[None]:
        async def write() -> None:
            path = await directory.await_creation()
            if jax.process_index() == 0:
                for name, text in self._texts.items():
                    (path / name).write_text(text)

        return write()

    async def load(self, directory: Any) -> Awaitable[None]:
        raise CheckpointError(f"{directory}: restores never ask orbax for these; see read_meta.")


class SummedArrays:
    """A tree of arrays, and checksums of the files that this process writes for them.

    `take_sums` collects those of all processes.
    """

    def __init__(self, name: str, tree: Mapping[str, Any]) -> None:
        """`name`: of the arrays' folder in the checkpoint."""
        self._name, self._tree = name, dict(tree)

    async def save(self, directory: Any) -> Awaitable[None]:
        written = await ocp.handlers.PyTreeHandler().save(directory, self._tree)

        async def add_sums() -> None:
            folder = pathlib.Path(await directory.await_creation())
            own = (jax.process_index(), jax.process_count())
            sums = integrity.checksums(folder, own, name=self._name)
            write_whole(_sums_file(folder.parent, own[0]), json.dumps(sums))

        return _Then(written, add_sums)

    async def load(self, directory: Any) -> Awaitable[None]:
        raise CheckpointError(f"{directory}: restores ask orbax for a plain tree of arrays.")


def take_sums(directory: pathlib.Path) -> integrity.Sums:
    """Returns the checksums in a checkpoint's directory of all processes; removes their files."""
    listed: integrity.Sums = {}
    for index in range(jax.process_count()):
        file = _sums_file(directory, index)
        listed |= json.loads(file.read_text())
        file.unlink()
    return listed


def _sums_file(directory: pathlib.Path, index: int) -> pathlib.Path:
    return directory / f"process_{index}.sums"


class _Then:
    """Awaits what orbax writes, which it may cancel through `commit_futures`, then `after`."""

    def __init__(self, first: Any, after: Callable[[], Awaitable[None]]) -> None:
        self.commit_futures = first.commit_futures
        self._first, self._after = first, after

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._first.__await__()
        yield from self._after().__await__()
