"""From this host's batches to global arrays on the mesh. Letters: B batch (global), A
micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from perception_jax.errors import ConfigError, DataError, TrainingError
from perception_jax.shard import distributed
from perception_jax.shard import mesh as mesh_lib
from perception_jax.train import state_tree
from perception_jax.train.accumulate import in_micro_batches
from perception_jax.train.task import Batch

ID = "id"
"""Batch key of the record ids."""

Signature = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of the leaves of a batch by path."""


@runtime_checkable
class Resumable(Protocol):
    """Protocol of an iterator over batches that can continue elsewhere, as grain's do."""

    def __next__(self) -> Batch:
        """The next batch."""

    def get_state(self) -> Any:
        """Its place before the next batch."""

    def set_state(self, state: Any) -> None:
        """Continues from a place."""


@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """A batch on the devices.

    Attributes:
      arrays: global arrays `[B, …]`, split over the batch axes of the mesh; or micro-batches of
        them, `[A, B / A, …]`, of which each is split.
      ids: ids of this host's records, () where the loader gives none.
      shape: number of the declared shape.
    """

    arrays: dict[str, Any]
    ids: tuple[str, ...]
    shape: int


class BatchFeed:
    """Takes batches from an endless dataset and places them on the mesh.

    Attributes:
      iterator: the dataset's iterator.
    """

    def __init__(
        self,
        dataset: Iterable[Batch],
        mesh: Mesh,
        batch_size: int,
        shapes: Sequence[Batch] = (),
        accumulate: int = 1,
    ) -> None:
        """Opens a dataset.

        Args:
          shapes: of the global batches; () takes that of the first batch for all.
          accumulate: micro-batches into which each is cut.

        Raises:
          ConfigError: the mesh does not divide the (micro-)batches, or a shape has other rows.
        """
        hosts = jax.process_count()
        mesh_lib.check_batch(mesh, batch_size, hosts, accumulate)
        self._dataset = dataset
        self.iterator = iter(dataset)
        if not isinstance(self.iterator, Resumable):
            raise ConfigError(
                f"the task's dataset is a {type(dataset).__name__} whose iterator has no "
                "`get_state` and `set_state`: training could not resume exactly. Return a "
                "grain.IterDataset."
            )
        self._accumulate = accumulate
        self._sharding = mesh_lib.batch_sharding(mesh, axis=int(accumulate > 1))
        self._host_batch = batch_size // hosts
        self._declared = bool(shapes)
        self._keys = {key for shape in shapes for key in shape}
        self._shapes = [signature(shape, hosts) for shape in shapes]
        rows = {(shape or (0,))[0] for one in shapes for shape, _ in signature(one).values()}
        if rows - {batch_size}:
            raise ConfigError(
                f"the task declares batches of {sorted(rows)} rows, train.batch_size is "
                f"{batch_size}; they must be equal."
            )
        self._place: Any = None

    def place(self) -> Any:
        """The iterator's state before the next batch: what a checkpoint keeps."""
        return self.iterator.get_state() if self._place is None else self._place

    def stay_at(self, place: Any) -> None:
        """Makes `place` the place for good, where a batch was left half way or not used."""
        self._place = place

    def next(self) -> DeviceBatch:
        """The next batch.

        Raises:
          DataError: the dataset ended, a key is not numeric, or a shape is none of the declared.
          TrainingError: another process has a batch of another shape.
        """
        try:
            batch = dict(next(self.iterator))
        except StopIteration as error:
            raise DataError(
                "the training dataset ended; it must be endless (repeat it before batching)."
            ) from error
        ids = _ids(batch)
        batch = {k: v for k, v in batch.items() if k != ID and (not self._keys or k in self._keys)}
        shape = self._shape_of(batch, ids)
        place = jax.make_array_from_process_local_data
        # Hosts take rows in turn, so that their m-th parts are the m-th part of the whole batch.
        parts = in_micro_batches(jax.tree.map(np.asarray, batch), self._accumulate)
        arrays = jax.tree.map(lambda x: place(self._sharding, x), parts)
        return DeviceBatch(arrays, ids, shape)

    def require_same_records(self, first: Sequence[str], moved: str) -> None:
        """Compares the first batch of the data with that of the run so far.

        The position in the data fits any data of the same length; its records may still be others.

        Args:
          first: ids of the records in the run's first batch.
          moved: the settings that changed, for the message.

        Raises:
          DataError: the ids differ.
        """
        iterator = iter(self._dataset)
        try:
            found = _ids(next(iterator))
        finally:
            _close(iterator)
        # On another number of hosts, this one sees another part of the batch.
        same = found == tuple(first) if len(found) == len(first) else found[:1] == tuple(first[:1])
        if not same:
            raise DataError(
                f"the training data are not those of the run: its first batch began with "
                f"{list(first[:4])}, that of these data begins with {list(found[:4])} ({moved}). "
                "Point the setting at the same data, or start a new run in another workdir."
            )

    def close(self) -> None:
        """Ends the iterator's threads and worker processes."""
        _close(self.iterator)

    def _shape_of(self, batch: Mapping[str, Any], ids: tuple[str, ...]) -> int:
        """The number of the batch's shape, the same on all processes."""
        found = signature(batch)
        for name, (shape, dtype) in found.items():
            if dtype.kind not in "biufV":  # V: ml_dtypes such as bfloat16
                raise DataError(
                    f"batch key {name!r} has dtype {dtype}; only numbers and booleans go to "
                    f"the devices (text belongs under {ID!r}). Drop it in the transform."
                )
            if not shape or shape[0] != self._host_batch:
                raise DataError(
                    f"batch key {name!r}: expected {self._host_batch} examples on its first axis "
                    f"(batch_size over hosts), found shape {shape}. Set the loader's batch "
                    "size to it and drop incomplete batches."
                )
        if not self._shapes:
            self._shapes.append(found)
        if found not in self._shapes:
            raise DataError(
                f"records {list(ids[:4])} …: expected a batch of {self._expected(found)} "
                "Pad to such a shape in the transform, or declare this one (the task's "
                "`batch_shapes`)."
            )
        number = self._shapes.index(found)
        if len(self._shapes) > 1:
            _require_same_shape(number, found)
        return number

    def _expected(self, found: Signature) -> str:
        """What `found` should be, for a message."""
        if len(self._shapes) > 1:
            known = "; ".join(
                f"{k}. {described(shape)}" for k, shape in enumerate(self._shapes, start=1)
            )
            return f"one of the declared shapes ({known}), found {described(found)}."
        (only,) = self._shapes
        differing = sorted(k for k in found.keys() | only.keys() if found.get(k) != only.get(k))
        wanted, has = (
            described({k: one[k] for k in differing if k in one}) or "nothing"
            for one in (only, found)
        )
        source = "the declared shape" if self._declared else "the shape of the first"
        return f"{source}, {wanted}, found {has}."


def described(found: Signature) -> str:
    """Names, dtypes and shapes of a batch, for reading."""
    return ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in found.items())


def signature(batch: Batch, hosts: int = 1) -> Signature:
    """Shapes and dtypes of a batch or of a host's part of it, the dtypes as on a device."""
    found = {}
    for name, leaf in sorted(state_tree.flatten(dict(batch)).items()):
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            leaf = np.asarray(leaf)
        shape = (leaf.shape[0] // hosts, *leaf.shape[1:]) if leaf.shape else ()
        dtype = np.dtype(leaf.dtype)
        known = dtype.kind in "biufV"
        found[name] = (shape, jax.dtypes.canonicalize_dtype(dtype) if known else dtype)
    return found


def _require_same_shape(number: int, found: Signature) -> None:
    """Raises an error on all processes if they are about to run different programs: the collectives
    of these would wait for each other forever."""
    texts = distributed.exchange("shape of the batch", f"{number + 1}. {described(found)}")
    if len(set(texts)) > 1:
        listed = "; ".join(f"process {k}: {text}" for k, text in enumerate(texts))
        raise TrainingError(
            f"the processes have batches of different shapes at one step ({listed}). The shape "
            "must follow from the step alone (see `data.planned`)."
        )


def _ids(batch: Batch) -> tuple[str, ...]:
    return tuple(str(item) for item in np.ravel(batch.get(ID, ())))


def _close(iterator: Any) -> None:
    close = getattr(iterator, "close", None)  # plain iterators have none
    if close is not None:
        close()
