"""Scenes as a source of records: index → seed → spec → pixels → words.

Shape letters: H W canvas.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
from jaxtyping import UInt8

from perception_jax.data.records import ObjectAnnotation, Record
from perception_jax.data.scenes import facts, language, phrases
from perception_jax.data.scenes.facts import Fact
from perception_jax.data.scenes.render import Rendered, render
from perception_jax.data.scenes.sample import SceneConfig, portrait_spec, sample_spec
from perception_jax.data.scenes.spec import SceneSpec
from perception_jax.errors import ConfigError

SCENES_TRIED = 100
"""Number of scenes sampled to find one with all objects visible."""


class ScenesSource:
    """Random access to generated records; see `data.records.Source`.

    A record depends on the config, the seed and its index only: not on the process, nor on what
    was read before. There is no end to scenes: `length` is the size of an epoch.
    """

    def __init__(self, config: SceneConfig, *, seed: int, length: int) -> None:
        """Checks the settings; `seed` is non-negative, `length` the number of records.

        Raises:
          ConfigError: a negative seed or length, or names that the split lacks.
        """
        if seed < 0 or length < 0:
            raise ConfigError(f"expected seed >= 0 and length >= 0, found {seed} and {length}.")
        config.vocabulary()
        self.config, self.seed, self._length = config, seed, length

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"ScenesSource({self.config}, seed={self.seed}, length={self._length})"

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < self._length:
            raise IndexError(f"scene {index} of {self._length}")
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, index]))
        spec, rendered = draw_scene(rng, self.config)
        identity = f"scenes-{self.config.split}-{self.seed}-{index:06d}"
        return scene_record(identity, spec, rendered, self.config, rng)


def draw_scene(rng: np.random.Generator, config: SceneConfig) -> tuple[SceneSpec, Rendered]:
    """Samples and renders a scene in which every object is seen by at least `min_visible`.

    The sampler tries overlaps out at a coarse size. What turns out to be hidden at the real size
    is taken out, first the text, then objects; a scene left with too few is sampled again.

    Raises:
      ConfigError: the settings leave no room for that many visible objects.
    """
    for _ in range(SCENES_TRIED):
        spec = sample_spec(rng, config)
        rendered = render(spec, config.shape)
        if spec.text is not None and not _all_seen(rendered, config):
            spec = dataclasses.replace(spec, text=None)
            rendered = render(spec, config.shape)
        if not _all_seen(rendered, config):
            seen = (o.placement for o in rendered.objects if o.visible >= config.min_visible)
            spec = dataclasses.replace(spec, placements=tuple(seen))
            rendered = render(spec, config.shape)
        if len(spec.placements) >= config.count[0]:
            return spec, rendered
    raise ConfigError(
        f"expected room for {config.count[0]} objects that are visible by {config.min_visible}, "
        f"found none in {SCENES_TRIED} scenes of {config}; lower count or min_visible, or raise "
        "canvas or min_pixels."
    )


def _all_seen(rendered: Rendered, config: SceneConfig) -> bool:
    return all(o.visible >= config.min_visible for o in rendered.objects)


def scene_record(
    identity: str,
    spec: SceneSpec,
    rendered: Rendered,
    config: SceneConfig,
    rng: np.random.Generator,
) -> Record:
    """The record of a rendered scene; `extras["spec"]` is the spec.

    Each object has two captions, one with its name and one without.
    Objects seen by less than `config.min_visible` are left out; indices of the record's language
    count the others.
    """
    observed = facts.observe(
        spec, rendered.objects, canvas=config.shape, min_visible=config.min_visible
    )
    words = _describe(observed, config, rng)
    captions = words.object_captions or [()] * len(observed.objects)
    height, width = rendered.image.shape[:2]
    return Record(
        id=identity,
        images=(rendered.image,),
        size=(width, height),
        captions=words.captions,
        objects=tuple(
            _annotation(fact, rendered, said)
            for fact, said in zip(observed.objects, captions, strict=True)
        ),
        referring=words.referring,
        questions=words.questions,
        instructions=words.instructions,
        absent=words.absent,
        extras={"spec": spec},
    )


def _describe(
    observed: facts.SceneFacts, config: SceneConfig, rng: np.random.Generator
) -> language.Description:
    if config.language == "none":
        return language.Description()
    if config.language in ("captions", "facts"):
        return language.caption(observed, rng, facts=config.language == "facts")
    return language.describe(observed, rng, config.vocabulary())


def _annotation(fact: Fact, rendered: Rendered, captions: tuple[str, ...]) -> ObjectAnnotation:
    item = rendered.objects[fact.index]
    known = {
        "colour": fact.colour,
        "size": fact.size,
        "facing": None if fact.facing == "front" else fact.facing,
        "position": position(fact),
        "style": item.placement.style,
    }
    return ObjectAnnotation(
        name=fact.name,
        box=item.box,
        mask=rendered.masks[fact.index],
        captions=captions,
        attributes={key: value for key, value in known.items() if value is not None},
    )


def position(fact: Fact) -> str | None:
    """Returns "top left", "left", "top", "middle", ...; None if ambiguous."""
    return " ".join(phrases.sides(fact)) or None


def portrait(
    concept: str, style: str, canvas: int | tuple[int, int], seed: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Draws one object by one artist, large, near the middle, over a random background.

    The same arguments give the same pixels. Concepts and styles of one seed differ in place, size
    and background, so a set of portraits cannot be separated by those.

    Args:
      canvas: (height, width) in pixels, or the side of a square.

    Raises:
      DataError: unknown concept or style.
    """
    key = zlib.crc32(f"{style}/{concept}".encode())
    rng = np.random.default_rng(np.random.SeedSequence([seed, key]))
    return render(portrait_spec(rng, concept, style), canvas).image
