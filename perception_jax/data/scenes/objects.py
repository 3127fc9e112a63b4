"""Scenes of several objects, with the names of what is known to be absent."""

from __future__ import annotations

import dataclasses

import numpy as np

from perception_jax.data.records import Record, Source
from perception_jax.data.scenes.concepts import by_name, concepts, family_of
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource
from perception_jax.data.sources.combine import InMemory

_KEPT_FIELDS = ("size", "objects", "absent", "not_exhaustive")
TEST_SEED = 30_000
"""Seed of the test scenes, which no training seed reaches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectScenesConfig:
    """Settings of the scenes.

    Attributes:
      canvas: side in pixels.
      objects: fewest and most objects of a scene.
      size: shortest and longest side of an object, as a share of the canvas.
      names: of the objects; () for all names of the training split.
      unnamed: whether half of the captions leave the name out.
    """

    canvas: int = 64
    objects: tuple[int, int] = (2, 4)
    size: tuple[float, float] = (0.15, 0.7)
    names: tuple[str, ...] = ()
    unnamed: bool = False


class ObjectScenes:
    """Records of scenes with captions of each object and names of absent ones.

    Objects have a caption with their name, and if `unnamed` one without. `not_exhaustive` lists
    names related to those of the objects: they may apply too. `absent` has `negatives` random names
    of things that are not there; with 0 everything else is absent.
    """

    def __init__(self, scenes: ScenesSource, *, negatives: int = 0, unnamed: bool = False):
        self._scenes, self._negatives, self._unnamed = scenes, negatives, unnamed
        self._names = tuple(concept.name for concept in scenes.config.vocabulary())

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Record:
        record = self._scenes[index]
        shown = {item.name for item in record.objects}
        kin = {other.name for name in shown for other in family_of(by_name(name))}
        captions = None if self._unnamed else 1
        return dataclasses.replace(
            record,
            objects=tuple(
                dataclasses.replace(item, mask=None, captions=item.captions[:captions])
                for item in record.objects
            ),
            absent=self._absent(index, kin),
            not_exhaustive=tuple(sorted(kin - shown)),
        )

    def _absent(self, index: int, kin: set[str]) -> tuple[str, ...]:
        if not self._negatives:
            return ()
        rng = np.random.default_rng(np.random.SeedSequence([TEST_SEED, index]))
        free = [name for name in self._names if name not in kin]
        chosen = rng.choice(len(free), min(self._negatives, len(free)), replace=False)
        return tuple(free[k] for k in np.sort(chosen))


def training_scenes(config: ObjectScenesConfig, *, seed: int, length: int) -> Source:
    """Scenes drawn by the four training artists, each rendered once per process and kept."""
    scenes = _scenes(config, "train", seed, length)
    return InMemory(ObjectScenes(scenes, unnamed=config.unnamed), keep=_KEPT_FIELDS)


def test_scenes(config: ObjectScenesConfig, *, length: int, negatives: int) -> Source:
    """Scenes drawn by the test artist, of the names of the training split."""
    scenes = _scenes(config, "test", TEST_SEED, length)
    return InMemory(ObjectScenes(scenes, negatives=negatives), keep=_KEPT_FIELDS)


def names(count: int = 0) -> tuple[str, ...]:
    """Names of the training split: `count` of them spread over the whole table, or all if 0."""
    known = tuple(concept.name for concept in concepts(held_out=False))
    count = min(count, len(known)) or len(known)
    return tuple(known[k * len(known) // count] for k in range(count))


def _scenes(config: ObjectScenesConfig, split: str, seed: int, length: int) -> ScenesSource:
    settings = SceneConfig(
        canvas=config.canvas,
        split=split,
        count=config.objects,
        size=config.size,
        names=config.names,
        repeat=0.0,
        text=0.0,
        language="all",
    )
    return ScenesSource(settings, seed=seed, length=length)
