"""The protocol between a system and the trainer: all that the trainer knows of a system."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from flax import nnx
from jax.sharding import Mesh

Batch = Mapping[str, Any]
"""Arrays with a leading batch axis, under the same keys in every system that has them:

- "image": uint8[B, H, W, 3], pixels; the loss normalises them on the device;
- "boxes" (float32[B, R, 4]) and "box_mask" (bool[B, R]): xyxy pixels of "image", and which of the
  R places hold a box; the others have no area;
- "ids" (int32[B, T]) and "id_mask" (bool[B, T]): tokens, and which of the T places hold one;
- "label": the class or the target that the row is about;
- "…_index": int32, row numbers of a table that the task holds, such as "caption_index";
- "id": numpy strings, the records' ids. The trainer takes them off for its messages and puts the
  rest on the devices.

A system adds others, such as "instruction", and prefixes these where it has a second of a kind
("altered_ids").
"""

Metrics = dict[str, jax.Array]
"""Scalars, float32, already reduced over the global batch."""


@runtime_checkable
class Evaluator(Protocol):
    """Measures a model, while it trains and afterwards."""

    def __call__(self, model: nnx.Module, mesh: Mesh) -> Mapping[str, float]:
        """Numbers to log.

        Args:
          model: the current one, on the mesh; must not be changed.
          mesh: of the run. Work is to be split over it (see `inference.batches`); on several
            processes all of them call this together.
        """


@runtime_checkable
class Task(Protocol):
    """A model, what of it trains, its loss and its data.

    `init` and `loss` are traced by `jax.jit`: pure, no I/O, no global state.
    """

    trainable: Any
    """An `nnx` filter (a Variable type such as `nnx.Param` or `AdapterParam`): what trains."""

    shardings: tuple[tuple[str, Any], ...]
    """`(path regex, PartitionSpec)` rows for `shard.rules`; the first match wins, and each leaf of
    the model must match one."""

    def init(self, key: jax.Array) -> nnx.Module:
        """The model with fresh parameters."""

    def pretrained(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Mapping[str, Any]:
        """Leaves to start from; called once, before the rest of a new run's model is initialised.

        Args:
          targets: shape, dtype and sharding of every leaf of the model by its "/"-joined path;
            frozen ones have the dtype `config.frozen_dtype`.

        Returns:
          Arrays by path, of the same shapes; {} for training from scratch. The trainer takes them
          over: a `jax.Array` with the target's dtype and sharding is not copied, and steps give its
          memory back. Anything else is cast and placed. What is not returned is initialised.
        """

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """Scalar float32 loss over the *global* batch, and metrics to log.

        With `config.optim.accumulate` the batch is one micro-batch (`train.accumulate`): a loss
        that compares rows has the negatives of that one only.

        Floating leaves of `model` have the dtype `config.compute_dtype`. The metrics' names must
        not be those that the trainer reports itself ("loss", "grad_norm", …; see `train.step`).
        The metric "tokens", the number of text tokens that are no padding, becomes a rate.
        """

    def datasets(self) -> Mapping[str, Iterable[Batch]]:
        """At least "train": an endless `grain.IterDataset` of this host's batches."""

    def evaluators(self) -> Mapping[str, Evaluator]:
        """Named evaluators, run every `config.evaluate_every` steps and at the end.

        Called when they are first needed, so that training does not begin by reading test data.
        """


@runtime_checkable
class DeclaresShapes(Protocol):
    """A task that declares the shapes of its batches: text lengths, image grids, text alone.

    Without it, all batches have the shape of the first.
    """

    def batch_shapes(self) -> Sequence[Batch]:
        """Returns the finite set of global batches as `jax.ShapeDtypeStruct`s, without "id".

        The trainer compiles the step for each of them before the first step, in this order, which
        must be the same on all processes. Every batch must be one of them; keys that none of them
        has stay on the host. On several processes, all batches of one step must have one shape.
        """


@runtime_checkable
class MeanLoss(Protocol):
    """What a task adds whose loss is a mean of terms of single rows, so that parts of a batch can
    be computed apart; see `train.accumulate`. Losses that compare rows of a batch are none.

    The task's metrics must be such means too. Where a batch is computed in parts each part has a
    key of its own, so that what is drawn from it, such as dropout, depends on the mesh.
    """

    mean_over: Literal["rows", "tokens"]
    """What counts the same: rows, or the tokens that the metric "tokens" counts."""


@runtime_checkable
class FeatureLoss(Protocol):
    """What a task adds whose loss compares rows, so that the rows can be computed apart:
    `loss(model, batch, key)` is `loss_of(model, features(model, batch, key))`.
    """

    def features(self, model: nnx.Module, batch: Batch, key: jax.Array) -> Any:
        """All that the loss needs to know of the rows: a pytree of arrays `[B, ...]`."""

    def loss_of(self, model: nnx.Module, features: Any) -> tuple[jax.Array, Metrics]:
        """The loss over the features of all rows, and metrics; see `Task.loss`."""
