"""Batches of conversations of similar length and one modality, as LLaVA's Trainer samples them.

Orders follow `llava_trainer.py` of LLaVA (arXiv 2310.03744) exactly, given the permutations that
are drawn; the division of an epoch into batches follows the Trainer of `transformers` 4.31 with
`accelerate`: the last batch is filled up from the start of the epoch, and micro-batches go on from
epoch to epoch.

Letters: N records, M rows of an update.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from perception_jax.data.planned import BatchPlan, Row
from perception_jax.errors import ConfigError, DataError

Order = Literal["random", "length", "modality"]
"""How an epoch is ordered: at random; in batches of similar length; the same with images and text
alone in batches of their own."""

Permute = Callable[[int], Int[np.ndarray, "_"]]
"""Draws a permutation of so many numbers."""

IMAGE_WORDS = 128
"""Words that an image counts as in order "length"."""
_ORDERS_KEPT = 2


def length_order(
    lengths: Int[np.ndarray, " N"], *, rows: int, devices: int, permute: Permute
) -> Int[np.ndarray, " N"]:
    """An order in which each run of `rows * devices` records has random records, the longest first,
    dealt out to the devices so that each gets about the same length.

    Args:
      lengths: positive.
      rows: of a device in a micro-batch.
      permute: called once.
    """
    order = np.asarray(permute(len(lengths)))
    size = rows * devices
    runs = (order[k : k + size] for k in range(0, len(order), size))
    sorted_runs = (run[np.argsort(-lengths[run], kind="stable")] for run in runs)
    return np.concatenate([_dealt(run, lengths, devices) for run in sorted_runs])


def modality_order(
    lengths: Int[np.ndarray, " N"], *, rows: int, devices: int, permute: Permute
) -> Int[np.ndarray, " N"]:
    """`length_order` of the records with images and of those without, with their runs mixed; only
    the last ones have both.

    Args:
      lengths: negative for records of text alone.
      permute: called three times: for records with images, those without, and runs.
    """
    size = rows * devices
    parts = []
    for sign in (1, -1):
        own = np.flatnonzero(lengths * sign > 0)
        if not len(own):
            return length_order(np.abs(lengths), rows=rows, devices=devices, permute=permute)
        parts.append((own, sign * lengths[own]))
    both = [
        own[length_order(found, rows=rows, devices=devices, permute=permute)]
        for own, found in parts
    ]
    runs = [[own[k : k + size] for k in range(0, len(own), size)] for own in both]
    rest = np.concatenate([runs[0].pop(), runs[1].pop()])
    whole = runs[0] + runs[1]
    mixed = [whole[k] for k in np.asarray(permute(len(whole)))]
    if len(rest) >= size:
        mixed, rest = [rest[:size], *mixed], rest[size:]
    return np.concatenate([*mixed, rest])


def _dealt(
    run: Int[np.ndarray, "_"], lengths: Int[np.ndarray, " N"], devices: int
) -> Int[np.ndarray, "_"]:
    """Deals out each record to the device with the smallest total that is not full."""
    if len(run) % devices:
        return np.concatenate([run[k::devices] for k in range(devices)])
    room = len(run) // devices
    hands: list[list[int]] = [[] for _ in range(devices)]
    totals: list[float] = [0.0] * devices
    for record, length in zip(run.tolist(), lengths[run].tolist(), strict=True):
        least = totals.index(min(totals))
        hands[least].append(record)
        totals[least] = math.inf if len(hands[least]) == room else totals[least] + length
    return np.array([record for hand in hands for record in hand], run.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Division:
    """How records are divided into updates, in the terms of the Trainer of `transformers`.

    Attributes:
      rows: of a device in a micro-batch (`per_device_train_batch_size`).
      devices: of the recipe (`world_size`); those of the run may be others.
      accumulate: micro-batches of an update (`gradient_accumulation_steps`).

    Raises:
      ConfigError: a number below 1.
    """

    rows: int
    devices: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)) < 1:
            raise ConfigError(
                f"division of the batch: expected numbers of at least 1, found {self}."
            )

    @property
    def micro(self) -> int:
        """Rows of a micro-batch on all devices."""
        return self.rows * self.devices

    @property
    def update(self) -> int:
        """Rows of an update."""
        return self.micro * self.accumulate

    def micro_batches(self, records: int) -> int:
        """Micro-batches of an epoch, the last of them filled up."""
        return -(-records // self.micro)

    def updates(self, records: int, epochs: int = 1) -> int:
        """Updates of a training: the length of its schedule."""
        return max(self.micro_batches(records) // self.accumulate, 1) * epochs


class RowShape(NamedTuple):
    """Shape of the rows of a batch.

    Attributes:
      length: tokens, image tokens included.
      images: whether there is room for images.
    """

    length: int
    images: bool


class GroupedPlanner:
    """Plans batches by an order of each epoch; a `data.planned.Planner`.

    The length of a batch's rows is the smallest of `lengths` that its longest row fits in. `group`
    of a row is the device that it belongs to in the recipe.
    """

    def __init__(
        self,
        *,
        records: Int[np.ndarray, " N"],
        words: Int[np.ndarray, " N"],
        tokens: Int[np.ndarray, " N"],
        lengths: Sequence[int],
        division: Division,
        order: Order,
        seed: int,
    ) -> None:
        """Draws nothing yet.

        Args:
          records: numbers of the records that can be used.
          words: of their conversations, negative without images.
          tokens: of their rows, image tokens included.
          lengths: of rows, ascending.

        Raises:
          DataError: no records, or a row longer than all of `lengths`.
        """
        if not len(records):
            raise DataError("expected conversations to train on, found none.")
        if tokens.max() > lengths[-1]:
            raise DataError(
                f"expected rows of at most {lengths[-1]} tokens, images included, found one of "
                f"{tokens.max()} (record number {records[tokens.argmax()]}). Raise the largest of "
                "`lengths`, or lower the most tokens of a text."
            )
        self.seed, self.order, self.division = seed, order, division
        self._records, self._words, self._tokens = records, words, tokens
        self._lengths = np.asarray(lengths)
        self._orders: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Pickles without the orders, which another process draws itself."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_orders", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._orders, self._lock = collections.OrderedDict(), threading.Lock()

    @property
    def batch_size(self) -> int:
        """Number of rows of an update."""
        return self.division.update

    @property
    def batches_per_epoch(self) -> int:
        """Number of updates per epoch."""
        return self.division.updates(len(self._records))

    def plan(self, epoch: int, step: int) -> BatchPlan:
        """Plans an update."""
        first = (epoch * self.batches_per_epoch + step) * self.division.accumulate
        chosen = np.concatenate(
            [self._micro_batch(first + k) for k in range(self.division.accumulate)]
        )
        return BatchPlan(
            record=self._records[chosen],
            group=np.arange(len(chosen)) // self.division.rows,
            columns={},
            shape=self._shape(chosen),
        )

    def redraws(self, epoch: int, step: int, place: int) -> Iterator[Row]:
        """Random records of the same modality that fit in the batch."""
        plan = self.plan(epoch, step)
        own = np.searchsorted(self._records, plan.record[place])
        same = (self._words > 0) == (self._words[own] > 0)
        fitting = np.flatnonzero(same & (self._tokens <= plan.shape.length))
        rng = np.random.default_rng([self.seed, epoch, step, place])
        for number in rng.permutation(fitting).tolist():
            yield Row(
                record=int(self._records[number]),
                group=int(plan.group[place]),
                seed=(self.seed, epoch, step, place, number),
                shape=plan.shape,
            )

    def _shape(self, chosen: Int[np.ndarray, " M"]) -> RowShape:
        longest = self._tokens[chosen].max()
        length = int(self._lengths[np.searchsorted(self._lengths, longest)])
        images = self.order != "modality" or bool((self._words[chosen] > 0).any())
        return RowShape(length, images)

    def _micro_batch(self, number: int) -> Int[np.ndarray, "_"]:
        """The records of a micro-batch, counted from the start of the run."""
        epoch, place = divmod(number, self.division.micro_batches(len(self._records)))
        order = self._order(epoch)
        start = place * self.division.micro
        return np.take(order, np.arange(start, start + self.division.micro), mode="wrap")

    def _order(self, epoch: int) -> Int[np.ndarray, " N"]:
        with self._lock:
            if epoch not in self._orders:
                self._orders[epoch] = self._drawn(np.random.default_rng([self.seed, epoch]))
                while len(self._orders) > _ORDERS_KEPT:
                    self._orders.popitem(last=False)
            return self._orders[epoch]

    def _drawn(self, rng: np.random.Generator) -> Int[np.ndarray, " N"]:
        if self.order == "random":
            return rng.permutation(len(self._records))
        rows = {"rows": self.division.rows, "devices": self.division.devices}
        if self.order == "modality":
            return modality_order(self._words, permute=rng.permutation, **rows)
        lengths = np.abs(self._words) + IMAGE_WORDS * (self._words > 0)
        return length_order(lengths, permute=rng.permutation, **rows)
