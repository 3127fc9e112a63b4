"""Minimal pairs: two scenes that differ in one visual pattern (MMVP, arXiv 2401.06209, §2)."""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from perception_jax.data.records import MMVP_PATTERNS, MinimalPair, Record
from perception_jax.data.scenes.edits import EDITS, PairSpec
from perception_jax.data.scenes.pair_layout import PairLayout
from perception_jax.data.scenes.render import render
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import scene_record
from perception_jax.errors import ConfigError

CAPTION = "a picture of {}"
"""Template that makes a caption of a statement."""


def minimal_pair(pattern: str, rng: np.random.Generator, config: SceneConfig) -> PairSpec:
    """Returns two specs that differ in one pattern only, in random order.

    Raises:
      ConfigError: an unknown pattern, or a vocabulary that cannot show it.
    """
    _check(pattern)
    draw = random.Random(int(rng.integers(2**63)))
    pair = EDITS[pattern](PairLayout(config, draw))
    return _swapped(pair) if draw.random() < 0.5 else pair


def minimal_pair_record(pattern: str, config: SceneConfig, *, seed: int, index: int) -> MinimalPair:
    """Renders and describes a pair of a pattern.

    Args:
      seed, index: non-negative; the same ones give the same pair.

    Raises:
      ConfigError: an unknown pattern, or a vocabulary that cannot show it.
    """
    _check(pattern)
    key = [seed, index, MMVP_PATTERNS.index(pattern)]
    rng = np.random.default_rng(np.random.SeedSequence(key))
    pair = minimal_pair(pattern, rng, config)
    identity = f"pair-{pattern}-{config.split}-{seed}-{index:06d}"
    first, second = (
        scene_record(f"{identity}-{side}", spec, render(spec, config.shape), config, rng)
        for side, spec in zip("ab", pair.specs, strict=True)
    )
    options = pair.answers if rng.random() < 0.5 else pair.answers[::-1]
    return MinimalPair(
        id=identity,
        pattern=pattern,
        records=(first, second),
        question=pair.question,
        options=options,
        answers=pair.answers,
        statements=pair.statements,
    )


class PairSource:
    """Random access to minimal pairs; index k shows pattern k modulo the number of patterns."""

    def __init__(
        self,
        config: SceneConfig,
        *,
        seed: int,
        length: int,
        patterns: tuple[str, ...] = MMVP_PATTERNS,
    ) -> None:
        """Checks the settings and the vocabulary.

        Args:
          seed: non-negative.
          length: number of pairs.
          patterns: the patterns of the pairs, in order.

        Raises:
          ConfigError: a negative seed or length, no pattern, an unknown one, or one that the
            config's vocabulary cannot show.
        """
        if seed < 0 or length < 0 or not patterns:
            raise ConfigError(
                "PairSource: expected seed >= 0, length >= 0 and at least one pattern, found "
                f"seed={seed}, length={length}, patterns={patterns}."
            )
        for pattern in patterns:
            minimal_pair(pattern, np.random.default_rng(0), config)
        self.config, self.seed, self.patterns, self._length = config, seed, patterns, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> MinimalPair:
        if not 0 <= index < self._length:
            raise IndexError(f"pair {index} of {self._length}")
        pattern = self.patterns[index % len(self.patterns)]
        return minimal_pair_record(pattern, self.config, seed=self.seed, index=index)


class PairImages:
    """The images of minimal pairs as single records, each with the statement that is true of it as
    its caption; records 2k and 2k + 1 are one pair."""

    def __init__(self, pairs: PairSource) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        pair = self._pairs[index // 2]
        record, statement = pair.records[index % 2], pair.statements[index % 2]
        return dataclasses.replace(record, captions=(CAPTION.format(statement),))


class BothImages:
    """The two images of each minimal pair as one record."""

    def __init__(self, pairs: PairSource) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Record:
        pair = self._pairs[index]
        return Record(id=pair.id, images=tuple(one.image for one in pair.records))


def _check(pattern: str) -> None:
    if pattern not in EDITS:
        raise ConfigError(
            f"expected a pattern out of {', '.join(MMVP_PATTERNS)}, found {pattern!r}."
        )


def _swapped(pair: PairSpec) -> PairSpec:
    return dataclasses.replace(
        pair,
        specs=pair.specs[::-1],
        answers=pair.answers[::-1],
        statements=pair.statements[::-1],
    )
