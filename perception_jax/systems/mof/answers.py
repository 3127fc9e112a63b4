"""Answers of a LLaVA to test questions, exactly as asked for. Letters: B rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool

from perception_jax.data.image_chats import ImageChats
from perception_jax.data.records import Source
from perception_jax.inference.batches import (
    CompiledPerMesh,
    current_mesh,
    divisible,
    fetched,
    joined,
    place,
)
from perception_jax.shard.mesh import batch_sharding, mesh_of
from perception_jax.systems.mof.task import chat_loss


class ExactAnswers(CompiledPerMesh):
    """Share of test questions that greedy decoding answers word by word as the record does.

    All tokens of the answer and of its end have the largest logit behind those before them, which
    is when greedy decoding writes that answer. No text is generated.

    Attributes:
      data: conversations of one question each.
    """

    def __init__(
        self,
        data: ImageChats,
        records: Source,
        *,
        together: int = 1,
        batch_size: int,
        dtype: np.typing.DTypeLike,
    ):
        """Reads nothing yet.

        Args:
          records: of the data; the kind of each one's question is its group.
          together: consecutive records that count as one, right if all are: 2 for minimal pairs.
          batch_size: rows of a call.
          dtype: in which the model computes.
        """
        super().__init__(functools.partial(_exact, dtype=dtype), batch_size=batch_size)
        self.data, self._records, self._together = data, records, together

    def __call__(self, model: nnx.Module, mesh: Mesh | None = None) -> Mapping[str, float]:
        """Returns "accuracy" of all, and of each group under its name."""
        exact = self.rows(model, mesh).reshape(-1, self._together).all(axis=1)
        found = {"accuracy": float(exact.mean())}
        groups = self.groups
        for name in sorted(set(groups)):
            found[name] = float(exact[groups == name].mean())
        return found

    @functools.cached_property
    def groups(self) -> np.ndarray:
        """The group of each question, or of those that count together."""
        rows = range(0, len(self._records), self._together)
        return np.array([self._records[row].questions[0].kind for row in rows])

    def rows(self, model: nnx.Module, mesh: Mesh | None = None) -> Bool[np.ndarray, " N"]:
        """Whether each record's question is answered exactly."""
        mesh = mesh or mesh_of(model)
        size = divisible(self.batch_size, mesh)
        split = None if mesh is None else batch_sharding(mesh)
        run = self._on(mesh)

        def calls() -> Iterator[tuple[Any, int]]:
            for batch in self.data.parts(size):
                yield run(model, {key: place(x, split) for key, x in batch.items()}), size

        with current_mesh(mesh):
            return joined(fetched(calls()))[: len(self._records)]


def _exact(
    model: nnx.Module, batch: Mapping[str, jax.Array], *, dtype: np.typing.DTypeLike
) -> jax.Array:
    found = chat_loss(model, batch, chunk=batch["ids"].shape[1], dtype=dtype)
    # A record that cannot be read has no labels; it counts as answered wrongly.
    return (found.row_correct == found.row_count) & (found.row_count > 0)
