"""Scenes as GiVE trains and is measured on them: several objects, most of them overlooked."""

from __future__ import annotations

import dataclasses

import numpy as np

from perception_jax.data.records import Record, Source
from perception_jax.data.scenes.concepts import by_name, concepts, family_of
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource
from perception_jax.data.sources.memory import InMemory

KEPT = ("size", "objects", "absent", "not_exhaustive")
TEST_SEED = 30_000
"""Of the unseen artist's scenes; training seeds never reach it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GiveScenesConfig:
    """Attributes:
    canvas: side in pixels.
    objects: fewest and most of a scene.
    size: shortest and longest side of an object, in canvas sides.
    names: of what is shown; () for everything that trains.
    unnamed: whether half of the captions leave the name out.
    """

    canvas: int = 64
    objects: tuple[int, int] = (2, 4)
    size: tuple[float, float] = (0.15, 0.7)
    names: tuple[str, ...] = ()
    unnamed: bool = False


class GiveScenes:
    """Records of scenes with what GiVE asks for.

    Objects have a caption with their name, and if `unnamed` one without. `not_exhaustive` has the
    kin of what is shown: nothing is claimed of it. `absent` has `negatives` random names of things
    that are not there; with 0 everything else is absent.
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


def training_scenes(config: GiveScenesConfig, *, seed: int, length: int) -> Source:
    """Four artists' drawings, each scene rendered once per process and kept."""
    scenes = _scenes(config, "train", seed, length)
    return InMemory(GiveScenes(scenes, unnamed=config.unnamed), keep=KEPT)


def test_scenes(config: GiveScenesConfig, *, length: int, negatives: int) -> Source:
    """The unseen artist's drawings of the names that trained."""
    scenes = _scenes(config, "test", TEST_SEED, length)
    return InMemory(GiveScenes(scenes, negatives=negatives), keep=KEPT)


def names(count: int = 0) -> tuple[str, ...]:
    """Names that train: `count` of them spread over the whole table, or all if 0."""
    known = tuple(concept.name for concept in concepts(held_out=False))
    count = min(count, len(known)) or len(known)
    return tuple(known[k * len(known) // count] for k in range(count))


def _scenes(config: GiveScenesConfig, split: str, seed: int, length: int) -> ScenesSource:
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
