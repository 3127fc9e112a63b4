"""Samples a scene's spec at random: objects, positions, sizes, background."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from perception_jax.data.scenes import concepts as table
from perception_jax.data.scenes import palette
from perception_jax.data.scenes.backgrounds import contrast
from perception_jax.data.scenes.concepts import Concept
from perception_jax.data.scenes.spec import (
    BACKGROUND_KINDS,
    STYLES,
    TEST_STYLE,
    TRAIN_STYLES,
    Background,
    DrawnText,
    Placement,
    SceneSpec,
)
from perception_jax.data.scenes.sprites import corner, outline
from perception_jax.data.scenes.visibility import (
    VisibilityMap,
    extent,
    shape_of,
    text_extent,
    text_shape,
)
from perception_jax.data.scenes.words import WORDS
from perception_jax.errors import ConfigError

COARSE = 64
"""Pixels along the canvas's shorter side for testing overlaps."""
TRIES = 12
"""Positions tried for an object before it is made smaller."""
SHRINK = 0.75
"""Factor on an object's size after `TRIES` positions that cover too much."""
CROWD = 1.4
"""Sizes are capped at `CROWD` / √(number of objects) of the largest."""
MAX_EXTENT = 0.98
"""Largest extent of a rotated sprite, as a fraction of the canvas."""
TEXT_SIZE = (0.08, 0.2)
"""Range of text heights, in shorter sides of the canvas."""
PORTRAIT_SIZE = (0.65, 0.9)
"""Range of the size of a single object, in shorter sides of the canvas."""
MAX_CONTRAST = 62.0
"""Largest CIELAB distance between a background's two colours."""
COLLAGE_PIECES = (6, 12)
"""Range of the number of objects in a collage."""
COLLAGE_SIZE = (0.2, 0.5)
"""Range of the sizes of a collage's objects."""
LANGUAGES = ("all", "captions", "facts", "none")
"""Values of `SceneConfig.language`."""
COLOUR_IS_IDENTITY = frozenset({"rainbow", "traffic light", "tangerine", "compact disc"})
"""Concepts that are not recoloured, in addition to those with a colour in their name."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SceneConfig:
    """Settings of scenes.

    Attributes:
      canvas: (height, width) in pixels, or the side of a square.
      split: "train": four styles, all but the held-out concepts; "test": the fifth style, the
        same concepts; "held_out": the fifth style, the held-out concepts.
      styles: overrides the split's styles; `spec.TEST_STYLE` stays out of "train".
      names: restricts the split's concepts to these; () keeps all.
      count: fewest and most objects.
      size: shortest and longest longest-side of a sprite, in shorter sides of the canvas; uniform
        in the square root, so that small ones are not rare.
      min_pixels: no sprite is drawn smaller than this many pixels, whatever `size` says.
      repeat: probability that a further object is of a concept that is already there.
      flip, rotate, tint, fade, text: probabilities per object (`text`: per scene).
      max_angle: largest rotation, degrees.
      overlap: probability that an object may cover part of others; the rest keep clear.
      max_overlap: largest share of an object that others and the text may cover.
      min_visible: objects that are seen by less are left out of the scene.
      backgrounds: kinds to choose from.
      language: what of it records carry beyond the objects' names: "all", "captions" of the image
        (for contrastive training, where the rest would be made for nothing), "facts": these and one
        that states a single fact, or "none".
    """

    canvas: int | tuple[int, int] = 128
    split: str = "train"
    styles: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    count: tuple[int, int] = (1, 8)
    size: tuple[float, float] = (0.02, 0.95)
    min_pixels: int = 3
    repeat: float = 0.25
    flip: float = 0.5
    rotate: float = 0.3
    max_angle: float = 40.0
    tint: float = 0.15
    fade: float = 0.05
    text: float = 0.15
    overlap: float = 0.35
    max_overlap: float = 0.3
    min_visible: float = 0.5
    backgrounds: tuple[str, ...] = BACKGROUND_KINDS
    language: Literal["all", "captions", "facts", "none"] = "all"

    def __post_init__(self) -> None:
        checks = {
            "split: train, test or held_out": self.split in ("train", "test", "held_out"),
            f"language: one of {LANGUAGES}": self.language in LANGUAGES,
            "canvas: at least 16 × 16 pixels": min(self.shape) >= 16,
            "count: 1 <= fewest <= most <= 8": 1 <= self.count[0] <= self.count[1] <= 8,
            "size: 0 < smallest <= largest <= 1": 0 < self.size[0] <= self.size[1] <= 1,
            "0 <= max_overlap <= 1 - min_visible": 0 <= self.max_overlap <= 1 - self.min_visible,
            f"styles: out of {STYLES}": set(self.styles) <= set(STYLES),
            f"styles: {TEST_STYLE} stays out of train": self.split != "train"
            or TEST_STYLE not in self.styles,
            f"backgrounds: out of {BACKGROUND_KINDS}": bool(self.backgrounds)
            and set(self.backgrounds) <= set(BACKGROUND_KINDS),
        }
        if broken := [rule for rule, holds in checks.items() if not holds]:
            raise ConfigError(f"SceneConfig: expected {'; '.join(broken)}; found {self}.")

    @classmethod
    def single(cls, **changes: object) -> SceneConfig:
        """Returns the settings of one large object without text, for classification."""
        settings = {"count": (1, 1), "size": (0.45, 0.95), "text": 0.0, "max_angle": 20.0}
        return cls(**{**settings, **changes})

    @property
    def shape(self) -> tuple[int, int]:
        """Canvas (height, width) in pixels."""
        return (self.canvas, self.canvas) if isinstance(self.canvas, int) else self.canvas

    @property
    def drawn_styles(self) -> tuple[str, ...]:
        """Styles that are drawn: `styles`, or those of the split."""
        return self.styles or (TRAIN_STYLES if self.split == "train" else (TEST_STYLE,))

    def vocabulary(self) -> tuple[Concept, ...]:
        """The concepts that may be drawn.

        Raises:
          ConfigError: `names` holds a name that the split does not have.
        """
        return _vocabulary(self.split, self.names)


@functools.cache
def _vocabulary(split: str, names: tuple[str, ...]) -> tuple[Concept, ...]:
    known = table.concepts(held_out=split == "held_out")
    if unknown := sorted(set(names) - {concept.name for concept in known}):
        raise ConfigError(
            f"SceneConfig.names: expected concepts of the split {split!r}, found {unknown}."
        )
    return tuple(concept for concept in known if not names or concept.name in names)


def sample_spec(rng: np.random.Generator, config: SceneConfig) -> SceneSpec:
    """Samples one scene; the same generator state gives the same spec."""
    height, width = config.shape
    scale = COARSE / min(height, width)
    visibility = VisibilityMap((round(height * scale), round(width * scale)))
    placements: list[Placement] = []
    chosen = _choose_concepts(rng, config)
    for concept in chosen:
        placement = _style_of(rng, config, concept, _size(rng, config, len(chosen)))
        placements.append(_place(rng, config, placement, visibility))
    text = None
    if rng.random() < config.text:
        text = _text(rng, config, visibility)
    used = {table.colour_of(placement) for placement in placements}
    return SceneSpec(
        background=_background(rng, config, placements, used | {text and text.colour}),
        placements=tuple(placements),
        text=text,
    )


def portrait_spec(rng: np.random.Generator, concept: str, style: str) -> SceneSpec:
    """Samples one upright object, large and near the middle, over a random background."""
    placement = Placement(
        concept=concept,
        style=style,
        x=float(rng.uniform(0.46, 0.54)),
        y=float(rng.uniform(0.46, 0.54)),
        size=float(rng.uniform(*PORTRAIT_SIZE)),
        flip=bool(rng.random() < 0.5),
    )
    used = {table.colour_of(placement)}
    background = _background(rng, SceneConfig(), [placement], used)
    return SceneSpec(background=background, placements=(placement,))


def _pick(rng: np.random.Generator, options: tuple) -> object:
    return options[int(rng.integers(len(options)))]


def _choose_concepts(rng: np.random.Generator, config: SceneConfig) -> list[Concept]:
    """Concepts of different families, some more than once."""
    vocabulary = config.vocabulary()
    wanted = int(rng.integers(config.count[0], config.count[1] + 1))
    chosen = [_pick(rng, vocabulary)]
    while len(chosen) < wanted:
        if rng.random() < config.repeat:
            chosen.append(_pick(rng, tuple(chosen)))
            continue
        candidate = _pick(rng, vocabulary)
        same = [other for other in chosen if other.family == candidate.family]
        chosen.append(same[0] if same else candidate)
    return chosen


def _size(rng: np.random.Generator, config: SceneConfig, number: int) -> float:
    """Uniform in the square root; the largest size falls with the number of objects."""
    low, high = config.size
    high = max(low, high * min(1.0, CROWD / number**0.5))
    smallest = config.min_pixels / min(config.shape)
    return max(float(rng.uniform(low**0.5, high**0.5)) ** 2, smallest)


def can_be_tinted(concept: Concept) -> bool:
    """Whether a recoloured drawing agrees with the concept's name."""
    words = concept.name.split()
    return concept.name not in COLOUR_IS_IDENTITY and not set(words) & set(palette.COLOURS)


def _style_of(
    rng: np.random.Generator, config: SceneConfig, concept: Concept, size: float
) -> Placement:
    """The object's look; its place is still the middle."""
    rotate, fade = rng.random() < config.rotate, rng.random() < config.fade
    tint = rng.random() < config.tint and can_be_tinted(concept)
    return Placement(
        concept=concept.name,
        style=_pick(rng, config.drawn_styles),
        x=0.5,
        y=0.5,
        size=size,
        angle=float(rng.uniform(-config.max_angle, config.max_angle)) if rotate else 0.0,
        flip=bool(rng.random() < config.flip),
        tint=_pick(rng, palette.TINTS) if tint else None,
        opacity=float(rng.uniform(0.7, 0.95)) if fade else 1.0,
    )


def _place(
    rng: np.random.Generator, config: SceneConfig, placement: Placement, canvas: VisibilityMap
) -> Placement:
    """Finds a place on the canvas that covers nothing too much, shrinking if there is none.

    The last resort, an object of the smallest size, is taken wherever it falls.
    """
    height, width = config.shape
    short = min(height, width)
    smallest = max(config.size[0], config.min_pixels / short)
    limit = config.max_overlap if rng.random() < config.overlap else 0.0
    while True:
        wide, tall = (side * short for side in extent(placement))
        fit = min(1.0, MAX_EXTENT * width / wide, MAX_EXTENT * height / tall)
        placement = dataclasses.replace(placement, size=placement.size * fit)
        half_x, half_y = wide * fit / width / 2, tall * fit / height / 2
        alpha = outline(placement, canvas.canvas)
        shape = shape_of(alpha)
        last = placement.size <= smallest
        for k in range(TRIES):
            x, y = float(rng.uniform(half_x, 1 - half_x)), float(rng.uniform(half_y, 1 - half_y))
            at = corner(x, y, alpha.size, canvas.canvas)
            if canvas.hidden_by(shape, at) <= limit or (last and k == TRIES - 1):
                canvas.cover(shape, at)
                return dataclasses.replace(placement, x=x, y=y)
        size = max(smallest, placement.size * SHRINK)
        placement = dataclasses.replace(placement, size=size)


def _text(rng: np.random.Generator, config: SceneConfig, canvas: VisibilityMap) -> DrawnText | None:
    """A word where it fits and covers nothing too much; None if no try finds a place."""
    height, width = config.shape
    short = min(height, width)
    word, colour = _pick(rng, WORDS), _pick(rng, palette.NAMES)
    for _ in range(TRIES):
        size = float(rng.uniform(*TEXT_SIZE))
        wide, tall = (side * short for side in text_extent(word, size))
        half_x, half_y = wide / width / 2, tall / height / 2
        if max(half_x, half_y) >= 0.5:
            continue
        x, y = float(rng.uniform(half_x, 1 - half_x)), float(rng.uniform(half_y, 1 - half_y))
        text = DrawnText(text=word, x=x, y=y, size=size, colour=colour)
        if canvas.hidden_by(text_shape(text, canvas.canvas), (0, 0)) <= config.max_overlap:
            return text
    return None


def _background(
    rng: np.random.Generator,
    config: SceneConfig,
    placements: list[Placement],
    used: set[str | None],
) -> Background:
    """A background of colours that no object and no text has."""
    kind = _pick(rng, config.backgrounds)
    free = [name for name in palette.NAMES if name not in used]
    colours = [_pick(rng, tuple(free))]
    if kind not in ("flat", "collage"):
        colours.append(_companion(rng, colours[0], free))
    far = _collage(rng, placements) if kind == "collage" else ()
    return Background(
        kind=kind, colours=tuple(colours), seed=int(rng.integers(2**31)), placements=far
    )


def _companion(rng: np.random.Generator, colour: str, free: list[str]) -> str:
    """A second colour that goes with the first: free, and not too far from it."""
    others = sorted((name for name in free if name != colour), key=lambda n: contrast(colour, n))
    near = [name for name in others if contrast(colour, name) <= MAX_CONTRAST] or others[:1]
    return _pick(rng, tuple(near))


def _collage(rng: np.random.Generator, placements: list[Placement]) -> tuple[Placement, ...]:
    """Far things of other families than the objects, by the training artists in every split."""
    used = {table.by_name(placement.concept).family for placement in placements}
    known = table.concepts(held_out=False)
    pieces = [_pick(rng, known) for _ in range(int(rng.integers(*COLLAGE_PIECES)))]
    return tuple(
        Placement(
            concept=concept.name,
            style=_pick(rng, TRAIN_STYLES),
            x=float(rng.random()),
            y=float(rng.random()),
            size=float(rng.uniform(*COLLAGE_SIZE)),
        )
        for concept in pieces
        if concept.family not in used
    )
