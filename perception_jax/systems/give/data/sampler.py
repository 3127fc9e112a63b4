"""The rows of GiVE's batches: groups of one class, with a second object and an absent class each.

A batch has G groups; a group is Q images of one class, two rows an image: the group's class, and
another class of the same image. So every row meets negatives of its own class (arXiv 2410.20109
names the losses; this sampling is the library's resolution). Each row also gets a class that its
image lacks.

`ClassGroups` is a source: row k of the batches, in order, is record k. It depends on the seed and k
alone, so `data.loader.make_loader(shuffle=False)` gives the same global batch on any number of
hosts and workers, and resumes by its position.

Letters: M rows of a batch, G groups, Q images of a group, C classes.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import threading
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from perception_jax.data.records import Instruction, Record, Source
from perception_jax.errors import ConfigError
from perception_jax.systems.give.data.instructions import FORMS
from perception_jax.systems.give.data.object_index import ObjectIndex

CANDIDATES = 16
"""Absent classes among which a hard one is chosen."""
HARD = 0.5
"""Chance of a hard absent class, from the second epoch on."""
FLIP = 0.5
BATCHES = 1_000_000
"""Length of the source in batches: more than any run takes, and the same for every run, since the
loader's saved place names the length."""

_PLANS_KEPT = 8
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """Attributes:
    groups: classes of a batch, all different.
    images: of each group.
    grouped: False draws as many rows at random from all (an ablation).
    seed: of all that is drawn.
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


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """One batch as numbers, one of each for every row.

    Attributes:
      image: record of the source.
      kind: the class that is looked for; `object`: an object of it, by its place in the record.
      absent: a class that the image lacks.
      caption: of the object; in `ObjectIndex.captions`.
      instruction, absent_instruction: in `ObjectIndex.instructions.strings`.
      flip: whether the image is mirrored.
    """

    image: Int32[np.ndarray, " M"]
    kind: Int32[np.ndarray, " M"]
    object: Int32[np.ndarray, " M"]
    absent: Int32[np.ndarray, " M"]
    caption: Int32[np.ndarray, " M"]
    instruction: Int32[np.ndarray, " M"]
    absent_instruction: Int32[np.ndarray, " M"]
    flip: Bool[np.ndarray, " M"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a plan, and its caption in words."""

    image: int
    kind: int
    object: int
    absent: int
    caption: int
    instruction: int
    absent_instruction: int
    flip: bool
    text: str


class BatchPlanner:
    """Draws batches; the same (seed, epoch, step) gives the same one.

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
        """Enough for as many rows as there are annotations."""
        return -(-self.index.counts.annotations // self.config.batch_size)

    def plan(self, epoch: int, step: int) -> Plan:
        """The batch of a step (from 0) of an epoch (from 0; its absent classes are not hard)."""
        index = self.index
        rng = np.random.default_rng(np.random.SeedSequence([self.config.seed, epoch, step]))
        pair = self._draw_pairs(rng)
        image, kind = index.pair_images[pair], index.pairs.values[pair]
        entry = index.entries.starts[pair] + _below(index.entries.counts()[pair], rng)
        caption, own = index.entries.values[entry], index.entry_own[entry]
        absent = self._draw_absent(image, rng, hard=HARD if epoch > 0 else 0.0)
        forms = rng.integers(len(FORMS), size=(2, len(pair)))
        made = index.instructions.by_class[kind, forms[0]]
        instruction = np.where(own >= 0, own, made)
        fixed = self._sided[caption] | self._sided_instruction[instruction]
        return Plan(
            image=image,
            kind=kind,
            object=index.entry_objects[entry],
            absent=absent,
            caption=caption,
            instruction=instruction,
            absent_instruction=index.instructions.by_class[absent, forms[1]],
            flip=(rng.random(len(pair)) < FLIP) & ~fixed,
        )

    def _draw_pairs(self, rng: np.random.Generator) -> Int[np.ndarray, " M"]:
        """Rows in the order group, image, object."""
        config, index = self.config, self.index
        if not config.grouped:
            return rng.integers(len(index.pairs.values), size=config.batch_size)
        kinds = rng.choice(len(self._shares), config.groups, replace=False, p=self._shares)
        pools = [index.by_class.of(kind) for kind in kinds.tolist()]
        drawn = [_draw_images(pool, config.images, rng) for pool in pools]
        first = np.stack([pairs for pairs, _ in drawn])
        seconds = self._other_objects(first, rng)
        for own, other, pool, (_, spare) in zip(first, seconds, pools, drawn, strict=True):
            alone = np.flatnonzero(other < 0)
            other[alone] = _more_images(own[alone], spare, pool, rng)
        return np.stack([first, seconds], axis=-1).reshape(-1)

    def _other_objects(
        self, first: Int[np.ndarray, "G Q"], rng: np.random.Generator
    ) -> Int[np.ndarray, "G Q"]:
        """A pair of another class of the same image, uniform; -1 where there is none."""
        pairs = self.index.pairs
        image = self.index.pair_images[first]
        start, count = pairs.starts[image], pairs.counts()[image]
        other = start + _below(np.maximum(count - 1, 1), rng)
        other += other >= first
        return np.where(count > 1, other, -1)

    def _draw_absent(
        self, image: Int[np.ndarray, " M"], rng: np.random.Generator, *, hard: float
    ) -> Int32[np.ndarray, " M"]:
        """A class for each row that its image lacks; hard ones with that chance.

        Verified absent classes if the image has any, else those not annotated; each alike. A hard
        one is that of `CANDIDATES` which is most often seen together with the image's classes.
        """
        candidates = self._candidates(image, rng)
        present, valid = self.index.present.padded(image)
        together = self.index.together[present[:, :, None], candidates[:, None, :]]
        score = np.where(valid[:, :, None], together, 0).sum(axis=1)
        chosen = np.where(rng.random(len(image)) < hard, score.argmax(axis=1), 0)
        return candidates[np.arange(len(image)), chosen]

    def _candidates(
        self, image: Int[np.ndarray, " M"], rng: np.random.Generator
    ) -> Int32[np.ndarray, "M _"]:
        """Random absent classes of each row's image, with replacement."""
        index = self.index
        draws = rng.random((len(image), CANDIDATES))
        negative, _ = index.negative.padded(image)
        verified = index.negative.counts()[image]
        listed = np.take_along_axis(negative, _scaled(draws, np.maximum(verified, 1)), axis=1)
        # The n-th class that is not excluded: n, moved up past the excluded ones before it.
        excluded, valid = index.excluded.padded(image)
        valid = valid & (excluded < index.annotated)
        before = np.where(valid, excluded - np.arange(excluded.shape[1]), index.annotated)
        free = np.maximum(index.annotated - valid.sum(axis=1), 1)
        number = _scaled(draws, free)
        moved = number + (before[:, None, :] <= number[:, :, None]).sum(axis=-1)
        return np.where(verified[:, None] > 0, listed, moved).astype(np.int32)


class ClassGroups:
    """The rows of all batches as a source; `extras["row"]` of a record is its `Row`.

    A record's instructions become those of its row: the present class's with its object, the
    absent class's with None.
    """

    def __init__(self, source: Source, planner: BatchPlanner) -> None:
        """Args: source: what the planner's index was built from."""
        self.source, self.planner = source, planner
        self._plans: collections.OrderedDict[int, Plan] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return BATCHES * self.planner.config.batch_size

    def __getitem__(self, index: int) -> Record:
        row = self.row(index)
        record = self.source[row.image]
        planner = self.planner.index
        strings = planner.instructions.strings
        return dataclasses.replace(
            record,
            id=f"{record.id} ({planner.names[row.kind]})",
            instructions=(
                Instruction(text=strings[row.instruction], target=row.object),
                Instruction(text=strings[row.absent_instruction], target=None),
            ),
            extras={**record.extras, "row": row},
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what only this process needs."""
        return {"source": self.source, "planner": self.planner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def row(self, index: int) -> Row:
        """What row `index` of the training is, without reading its record."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        batch, place = divmod(index, self.planner.config.batch_size)
        plan = self._plan(batch)
        numbers = {field.name: getattr(plan, field.name)[place] for field in _PLAN_FIELDS}
        row = {name: value.item() for name, value in numbers.items()}
        return Row(**row, text=self.planner.index.captions[row["caption"]])

    def _plan(self, batch: int) -> Plan:
        """Neighbouring rows, in several threads, ask for one plan."""
        with self._lock:
            if batch not in self._plans:
                plan = self.planner.plan(*divmod(batch, self.planner.batches_per_epoch))
                self._plans[batch] = plan
                while len(self._plans) > _PLANS_KEPT:
                    self._plans.popitem(last=False)
            return self._plans[batch]


_PLAN_FIELDS = dataclasses.fields(Plan)


def _draw_images(
    pairs: Int[np.ndarray, "_"], count: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " Q"], Int[np.ndarray, "_"]]:
    """`count` pairs of a class, different ones while there are any, and up to as many others."""
    order = rng.choice(len(pairs), min(len(pairs), 2 * count), replace=False)
    if len(order) < count:
        more = rng.integers(len(pairs), size=count - len(order))
        order = np.concatenate([order, more])
    return pairs[order[:count]], pairs[order[count:]]


def _more_images(
    alone: Int[np.ndarray, "_"],
    spare: Int[np.ndarray, "_"],
    pool: Int[np.ndarray, "_"],
    rng: np.random.Generator,
) -> Int[np.ndarray, "_"]:
    """Second images of a class, for rows whose image shows nothing else.

    Args:
      alone: the pairs of these rows.
      spare: pairs of the class that the group does not have yet: used first.
      pool: all pairs of the class, ascending.
    """
    given = spare[: len(alone)]
    rest = alone[len(given) :]
    if len(pool) == 1:
        return np.concatenate([given, rest])
    other = _below(np.full(len(rest), len(pool) - 1), rng)
    other += other >= np.searchsorted(pool, rest)
    return np.concatenate([given, pool[other]])


def _below(counts: Int[np.ndarray, "*N"], rng: np.random.Generator) -> Int[np.ndarray, "*N"]:
    """A whole number below each count, uniform."""
    return rng.integers(counts)


def _scaled(
    draws: Float[np.ndarray, "M K"], counts: Int[np.ndarray, " M"]
) -> Int[np.ndarray, "M K"]:
    """Draws in [0, 1) as whole numbers below each row's count."""
    return np.minimum((draws * counts[:, None]).astype(np.int64), counts[:, None] - 1)
