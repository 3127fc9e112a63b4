"""From this host's batches to global arrays on the mesh. Letters: B batch (global), A
micro-batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from perception_jax.errors import ConfigError, DataError
from perception_jax.shard import mesh as mesh_lib
from perception_jax.train import state_tree
from perception_jax.train.accumulate import in_micro_batches
from perception_jax.train.task import Batch

ID = "id"
"""Batch key of the record ids."""


@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """A batch on the devices.

    Attributes:
      arrays: global arrays `[B, …]`, split over the batch axes of the mesh; or micro-batches of
        them, `[A, B / A, …]`, of which each is split.
      ids: ids of this host's records, () where the loader gives none.
    """

    arrays: dict[str, Any]
    ids: tuple[str, ...]


class BatchFeed:
    """Takes batches from an endless dataset and places them on the mesh.

    Attributes:
      iterator: the dataset's iterator.
    """

    def __init__(
        self, dataset: Iterable[Batch], mesh: Mesh, batch_size: int, accumulate: int = 1
    ) -> None:
        """Opens a dataset; raises ConfigError if the mesh does not divide the (micro-)batches."""
        hosts = jax.process_count()
        mesh_lib.check_batch(mesh, batch_size, hosts, accumulate)
        self._dataset = dataset
        self.iterator = iter(dataset)
        for method in ("get_state", "set_state"):
            if not hasattr(self.iterator, method):
                raise ConfigError(
                    f"the task's dataset is a {type(dataset).__name__} whose iterator has no "
                    f"`{method}`: training could not resume exactly. Return a grain.IterDataset."
                )
        self._accumulate = accumulate
        self._sharding = mesh_lib.batch_sharding(mesh, axis=int(accumulate > 1))
        self._host_batch = batch_size // hosts
        self._first: dict[str, tuple[tuple[int, ...], np.dtype]] | None = None
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
          DataError: the dataset ended, a key is not numeric, or a shape is not as agreed.
        """
        try:
            batch = dict(next(self.iterator))
        except StopIteration as error:
            raise DataError(
                "the training dataset ended; it must be endless (repeat it before batching)."
            ) from error
        ids = _ids(batch)
        batch.pop(ID, None)
        self._check(batch, ids)
        place = jax.make_array_from_process_local_data
        # Hosts take rows in turn, so that their m-th parts are the m-th part of the whole batch.
        parts = in_micro_batches(jax.tree.map(np.asarray, batch), self._accumulate)
        arrays = jax.tree.map(lambda x: place(self._sharding, x), parts)
        return DeviceBatch(arrays, ids)

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

    def _check(self, batch: Mapping[str, Any], ids: tuple[str, ...]) -> None:
        found = {}
        for name, leaf in state_tree.flatten(batch).items():
            leaf = np.asarray(leaf)
            found[name] = (leaf.shape, leaf.dtype)
            if leaf.dtype.kind not in "biufV":  # V: ml_dtypes such as bfloat16
                raise DataError(
                    f"batch key {name!r} has dtype {leaf.dtype}; only numbers and booleans go to "
                    f"the devices (text belongs under {ID!r}). Drop it in the transform."
                )
            if leaf.ndim == 0 or leaf.shape[0] != self._host_batch:
                raise DataError(
                    f"batch key {name!r}: expected {self._host_batch} examples on its first axis "
                    f"(batch_size over hosts), found shape {leaf.shape}. Set the loader's batch "
                    "size to it and drop incomplete batches."
                )
        if self._first is None:
            self._first = found
        elif found != self._first:
            changed = [
                f"{name}: {self._first.get(name, 'absent')} first, {found.get(name, 'absent')} now"
                for name in sorted(found.keys() | self._first.keys())
                if found.get(name) != self._first.get(name)
            ]
            raise DataError(
                "batches must have the same shapes and dtypes throughout, or each new one would "
                f"be recompiled: {'; '.join(changed)} (records {list(ids[:4])} …). "
                "Pad to fixed sizes in the transform."
            )


def _ids(batch: Batch) -> tuple[str, ...]:
    return tuple(str(item) for item in np.ravel(batch.get(ID, ())))


def _close(iterator: Any) -> None:
    close = getattr(iterator, "close", None)  # plain iterators have none
    if close is not None:
        close()
