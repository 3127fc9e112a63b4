"""From this host's batches to global arrays on the mesh. Letters: B batch (global)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from perception_jax.errors import ConfigError, DataError
from perception_jax.shard import mesh as mesh_lib
from perception_jax.train.task import Batch

ID = "id"


@dataclasses.dataclass(frozen=True)
class Fed:
    """A batch on the devices.

    Attributes:
      arrays: global arrays `[B, …]`, split over the batch axes of the mesh.
      ids: ids of this host's records, () where the loader gives none.
    """

    arrays: dict[str, Any]
    ids: tuple[str, ...]


class Feed:
    """Takes batches off an endless dataset and places them.

    Attributes:
      iterator: the dataset's iterator; its state is saved with each checkpoint.
    """

    def __init__(self, dataset: Iterable[Batch], mesh: Mesh, batch_size: int) -> None:
        """Args: see `TrainConfig.batch_size`. Raises ConfigError if the mesh does not divide it."""
        hosts = jax.process_count()
        mesh_lib.check_batch(mesh, batch_size, hosts)
        self.iterator = iter(dataset)
        for method in ("get_state", "set_state"):
            if not hasattr(self.iterator, method):
                raise ConfigError(
                    f"the task's dataset is a {type(dataset).__name__} whose iterator has no "
                    f"`{method}`: training could not resume exactly. Return a grain.IterDataset."
                )
        self._sharding = mesh_lib.batch_sharding(mesh)
        self._host_batch = batch_size // hosts
        self._first: dict[str, tuple[tuple[int, ...], np.dtype]] | None = None

    def next(self) -> Fed:
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
        ids = tuple(str(item) for item in np.ravel(batch.pop(ID, ())))
        self._check(batch, ids)
        place = jax.make_array_from_process_local_data
        arrays = jax.tree.map(lambda x: place(self._sharding, np.asarray(x)), batch)
        return Fed(arrays, ids)

    def close(self) -> None:
        """Ends the iterator's threads and worker processes."""
        if hasattr(self.iterator, "close"):
            self.iterator.close()

    def _check(self, batch: Mapping[str, Any], ids: tuple[str, ...]) -> None:
        found = {}
        for keys, leaf in jax.tree.leaves_with_path(batch):
            name = jax.tree_util.keystr(keys, simple=True, separator="/")
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
                f"be compiled anew: {'; '.join(changed)} (records {list(ids[:4])} …). "
                "Pad to fixed sizes in the transform."
            )
