"""The rows of GiVE's batches: groups of one class, with a second object and an absent class each.

A batch has G groups; a group is Q images of one class, two rows an image: the group's class, and
another class of the same image. So every row meets negatives of its own class (arXiv 2410.20109
names the losses; this sampling is the library's resolution). Each row also gets a class that its
image lacks.

Letters: M rows of a batch, G groups, Q images of a group, C classes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from perception_jax.data.class_sampling import (
    draw_absent,
    draw_distinct,
    draw_other_class,
    draw_others,
)
from perception_jax.data.instructions import FORMS
from perception_jax.data.object_index import ObjectIndex
from perception_jax.data.planned import BatchPlan, Row
from perception_jax.errors import ConfigError

HARD = 0.5
"""Probability of a hard absent class, from the second epoch on."""
FLIP = 0.5
"""Probability of mirroring an image whose texts do not say left or right."""

_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Settings of the batches.

    Attributes:
      groups: classes of a batch, all different.
      images: of each group.
      grouped: False draws as many rows uniformly from all (an ablation).
      seed: of the sampler.
    """

    groups: int = 64
    images: int = 8
    grouped: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.groups, self.images) < 1 or self.seed < 0:
            raise ConfigError(f"expected at least 1 group and image and a seed >= 0, found {self}.")

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return 2 * self.groups * self.images


class BatchPlanner:
    """Plans batches (see `data.planned`) as a function of seed, epoch and step.

    Raises:
      ConfigError: fewer classes than groups.
    """

    def __init__(self, index: ObjectIndex, config: GroupConfig) -> None:
        if index.counts.classes < config.groups:
            raise ConfigError(
                f"groups: expected at most the {index.counts.classes} classes of the data, found "
                f"{config.groups}."
            )
        self.index, self.config = index, config
        shares = np.sqrt(index.by_class.counts())
        self._shares = shares / shares.sum()
        self._sided = np.array([bool(_SIDES.search(text)) for text in index.captions], bool)
        strings = index.instructions.strings
        self._sided_instruction = np.array([bool(_SIDES.search(s)) for s in strings], bool)

    @property
    def batches_per_epoch(self) -> int:
        """Enough batches for as many rows as there are annotations."""
        return -(-self.index.counts.annotations // self.config.batch_size)

    @property
    def seed(self) -> int:
        """Seed of the sampler."""
        return self.config.seed

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self.config.batch_size

    def plan(self, epoch: int, step: int) -> BatchPlan:
        """Plans the batch of a step of an epoch, both from 0; epoch 0 has no hard absent classes.

        Its columns:

        - "label", "absent_index": a class that the image shows and one that it lacks, in
          `ObjectIndex.names`;
        - "object": an object of "label", by its place in the record;
        - "caption_index": of the object; in `ObjectIndex.captions`;
        - "instruction_index", "absent_instruction_index": in `ObjectIndex.instructions.strings`;
        - "flip": whether the image is mirrored;
        - "augment": seed of the row's other changes of its image.
        """
        rng = np.random.default_rng(np.random.SeedSequence([self.config.seed, epoch, step]))
        pair = self._draw_pairs(rng)
        return BatchPlan(
            record=self.index.pair_images[pair],
            group=np.arange(len(pair)) // self._group_size,
            columns=self._draw_rest(pair, epoch, rng),
        )

    def redraws(self, epoch: int, step: int, place: int) -> Iterator[Row]:
        """Rows that can replace a row: other images of its group, first those not in the batch.

        If none of the group's class can be used, those of another class follow, the same for all
        rows of the group.
        """
        batch = self.plan(epoch, step)
        group = int(batch.group[place])
        labels = batch["label"][:: self._group_size]
        own = np.random.default_rng([self.config.seed, epoch, step, group])
        others = own.permutation(np.setdiff1d(np.arange(len(self._shares)), labels))
        for attempt, label in enumerate([labels[group], *others]):
            seed = (self.config.seed, epoch, step, place, attempt)
            # Both rows of an image draw the same order of images.
            rng = np.random.default_rng([self.config.seed, epoch, step, place // 2, attempt])
            for pair in self._other_pairs(batch, int(label), place, rng).tolist():
                columns = self._draw_rest(np.array([pair]), epoch, rng)
                image = self.index.pair_images[[pair]]
                yield BatchPlan(record=image, group=np.array([group]), columns=columns).row(0, seed)

    @property
    def _group_size(self) -> int:
        return 2 * self.config.images if self.config.grouped else self.config.batch_size

    def _other_pairs(
        self, batch: BatchPlan, label: int, place: int, rng: np.random.Generator
    ) -> Int[np.ndarray, "_"]:
        """Pairs of images that show a class, for a row whose record cannot be used."""
        index = self.index
        if not self.config.grouped:
            return rng.permutation(len(index.pairs.values))
        pairs = rng.permutation(index.by_class.of(label))
        mates = batch.record[batch.group == batch.group[place]]
        used = np.isin(index.pair_images[pairs], mates)
        pairs = np.concatenate([pairs[~used], pairs[used]])
        if place % 2 == 0:
            return pairs
        # An image's second row: another class of the same image, or the next image.
        second = draw_other_class(index, pairs, rng)
        return np.where(second < 0, np.roll(pairs, -1), second)

    def _draw_rest(
        self, pair: Int[np.ndarray, " M"], epoch: int, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Draws the other columns of rows with these pairs."""
        index = self.index
        image, label = index.pair_images[pair], index.pairs.values[pair]
        entry = index.entries.starts[pair] + rng.integers(index.entries.counts(pair))
        caption, own = index.entries.values[entry], index.entry_own[entry]
        absent = draw_absent(index, image, rng, hard=HARD if epoch > 0 else 0.0)
        forms = rng.integers(len(FORMS), size=(2, len(pair)))
        from_name = index.instructions.by_class[label, forms[0]]
        instruction = np.where(own >= 0, own, from_name)
        fixed = self._sided[caption] | self._sided_instruction[instruction]
        return {
            "label": label,
            "object": index.entry_objects[entry],
            "absent_index": absent,
            "caption_index": caption,
            "instruction_index": instruction,
            "absent_instruction_index": index.instructions.by_class[absent, forms[1]],
            "flip": (rng.random(len(pair)) < FLIP) & ~fixed,
            "augment": rng.spawn(1)[0].integers(2**32, size=len(pair)),
        }

    def _draw_pairs(self, rng: np.random.Generator) -> Int[np.ndarray, " M"]:
        """Draws the pair of each row, in the order group, image, object."""
        config, index = self.config, self.index
        if not config.grouped:
            return rng.integers(len(index.pairs.values), size=config.batch_size)
        labels = rng.choice(len(self._shares), config.groups, replace=False, p=self._shares)
        pools = [index.by_class.of(label) for label in labels.tolist()]
        drawn = [draw_distinct(pool, config.images, rng) for pool in pools]
        first = np.stack([pairs for pairs, _ in drawn])
        seconds = draw_other_class(index, first, rng)
        for own, other, pool, (_, spare) in zip(first, seconds, pools, drawn, strict=True):
            alone = np.flatnonzero(other < 0)
            if len(alone):
                other[alone] = draw_others(own[alone], spare, pool, rng)
        return np.stack([first, seconds], axis=-1).reshape(-1)
