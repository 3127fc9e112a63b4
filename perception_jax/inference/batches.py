"""A function of a model over many rows: calls of one shape on a mesh, so that nothing recompiles.

Letters: N all rows, B rows of a call.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Shaped

from perception_jax.errors import ConfigError, DataError
from perception_jax.ops.sharding import gathered
from perception_jax.shard import distributed
from perception_jax.shard.mesh import batch_sharding, batch_shards, mesh_of, replicated

_IN_FLIGHT = 2
"""Calls on the device before the first one's result is fetched."""


class CompiledPerMesh:
    """A function that is compiled once for each mesh and shape, with results on every device.

    Attributes:
      batch_size: rows of a call; on a mesh, the next multiple of its batch shards.
    """

    def __init__(self, function: Callable[..., Any], *, batch_size: int):
        """Compiles nothing yet.

        Args:
          function: of a model (any pytree or module) and further arrays; gives a pytree of arrays
            with B rows each. Traced by `jax.jit`.

        Raises:
          ConfigError: a batch size below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size: expected at least 1, found {batch_size}")
        self.batch_size = batch_size
        self._on = functools.lru_cache(maxsize=4)(functools.partial(Call, function))


class Batched(CompiledPerMesh):
    """A compiled function of a model over any number of rows.

    On a mesh the rows of a call are split over its batch axes, and the results, one row each, are
    on every device.
    """

    def __call__(
        self, model: Any, rows: Shaped[np.ndarray, "N ..."], mesh: Mesh | None = None
    ) -> Any:
        """The results of all rows as numpy arrays.

        Args:
          mesh: what the rows are split over; None takes the mesh that the model lies on, if any.
            Where it spans several processes, all of them call this with the same rows.

        Raises:
          DataError: no rows.
        """
        size = divisible(self.batch_size, mesh or mesh_of(model))
        return self.stream(model, (rows[k : k + size] for k in range(0, len(rows), size)), mesh)

    def stream(
        self, model: Any, parts: Iterable[Sequence[np.ndarray]], mesh: Mesh | None = None
    ) -> Any:
        """The same for rows that come in parts of at most `divisible(batch_size, mesh)`."""
        mesh = mesh or mesh_of(model)
        size = divisible(self.batch_size, mesh)
        split = None if mesh is None else batch_sharding(mesh)
        run = self._on(mesh)

        def calls() -> Iterator[tuple[Any, int]]:
            for part in parts:
                yield run(model, place(fill(part, size), split)), len(part)

        with current_mesh(mesh):
            return joined(fetched(calls()))

    def lower(
        self, model: Any, row: jax.ShapeDtypeStruct, mesh: Mesh | None = None
    ) -> jax.stages.Lowered:
        """The program of one call, for rows like `row`, to compile and inspect."""
        split = None if mesh is None else batch_sharding(mesh)
        shape = (divisible(self.batch_size, mesh), *row.shape)
        with current_mesh(mesh):
            rows = jax.ShapeDtypeStruct(shape, row.dtype, sharding=split)
            return self._on(mesh).jitted.lower(model, rows)


class Call:
    """A function under `jax.jit` whose results are replicated on a mesh.

    While a `shard.distributed.polling` is held on the mesh, the program also sums the votes of its
    processes, and `fetched` leaves where one of them wants to: all do at the same call, so that
    none waits for the others in a collective.
    """

    def __init__(self, function: Callable[..., Any], mesh: Mesh | None):
        """Compiles nothing yet."""

        def counting(votes: jax.Array, *arguments: Any) -> tuple[Any, jax.Array]:
            return function(*arguments), jnp.sum(votes)

        # Replicated results can be fetched by every process.
        whole = None if mesh is None else replicated(mesh)
        self.jitted = jax.jit(function, out_shardings=whole)
        self._counting = jax.jit(counting, out_shardings=whole)
        self._mesh = mesh

    def __call__(self, *arguments: Any) -> Any:
        """Starts the function; `fetched` takes what this returns."""
        poll = distributed.current_poll(self._mesh)
        if poll is None:
            return self.jitted(*arguments)
        return _Polled(*self._counting(poll.cast(), *arguments), poll.error)


@dataclasses.dataclass(frozen=True)
class _Polled:
    """Results of a call, how many votes there were to leave, and what is raised then."""

    out: Any
    votes: jax.Array
    error: type[BaseException]


def divisible(batch_size: int, mesh: Mesh | None) -> int:
    """The next multiple of a mesh's batch shards."""
    shards = 1 if mesh is None else batch_shards(mesh)
    return -(-batch_size // shards) * shards


def fill(rows: Sequence[np.ndarray] | np.ndarray, size: int) -> np.ndarray:
    """Stacks rows and repeats the last one up to `size` of them."""
    stacked = np.stack(rows)
    return np.concatenate([stacked, np.repeat(stacked[-1:], size - len(stacked), axis=0)])


def place(array: np.ndarray, sharding: NamedSharding | None) -> Any:
    """Puts an array that every process has on the devices of a mesh, those of others included."""
    if sharding is None:
        return array
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def fetched(calls: Iterable[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
    """Yields results on the host; the device works on the next call while one is fetched.

    Args:
      calls: pairs of a call's results and how many of its rows count; made as they are needed.
    """
    waiting: collections.deque[tuple[Any, int]] = collections.deque()
    for call in calls:
        waiting.append(call)
        if len(waiting) > _IN_FLIGHT:
            out, count = waiting.popleft()
            yield _on_host(out), count
    for out, count in waiting:
        yield _on_host(out), count


def joined(results: Iterable[tuple[Any, int]]) -> Any:
    """Concatenates the rows that count of the results of all calls.

    Args:
      results: as of `fetched`.

    Raises:
      DataError: there are none.
    """
    found = [jax.tree.map(lambda x, n=count: x[:n], out) for out, count in results]
    if not found:
        raise DataError("expected at least one row to run a model on, found none.")
    return jax.tree.map(lambda *out: np.concatenate(out), *found)


def in_parts(stream: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Yields up to `size` consecutive rows at a time."""
    rows = iter(stream)
    while part := list(itertools.islice(rows, size)):
        yield part


def current_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which activations are constrained on the mesh; nothing without one."""
    if mesh is None or mesh == jax.sharding.get_mesh():
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)


def _on_host(out: Any) -> Any:
    if isinstance(out, _Polled):
        if int(out.votes):
            raise out.error
        out = out.out
    return gathered(out)
