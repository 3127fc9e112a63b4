"""Specifications of scenes before rendering.

A scene has three steps: *sample* a `SceneSpec` from a seed, *render* it to pixels with exact boxes
and masks, *describe* it in words. A minimal pair is one spec edited in one respect and rendered
twice. Positions and sizes are fractions of the canvas, so one spec renders at any canvas size.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Facing = Literal["left", "right", "front"]
"""The side a drawing faces after any flip; "front" if it has no side."""

STYLES = ("noto", "noto_v1", "fluent_flat", "fluent_3d", "twemoji")
"""The five artists; `TRAIN_STYLES` are for training, `TEST_STYLE` only for testing."""
TRAIN_STYLES = STYLES[:4]
"""Artists whose drawings are for training."""
TEST_STYLE = STYLES[4]
"""The artist whose drawings are only for testing."""
BACKGROUND_KINDS = ("flat", "gradient", "noise", "texture", "collage")
"""Kinds of backgrounds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One sprite on the canvas; later placements are drawn over earlier ones.

    Attributes:
      concept: class name, e.g. "red apple".
      style: one of `STYLES`.
      x, y: centre, as fractions of the canvas (x to the right, y down).
      size: longest side of the sprite as a fraction of the canvas's shorter side, before rotation.
      angle: rotation in degrees, counter-clockwise.
      flip: mirrored left-right before rotation.
      tint: a name of `palette.COLOURS` that recolours the sprite, or None for its own colours.
      opacity: 1 is solid; at 0.5 or below the sprite counts as invisible.
    """

    concept: str
    style: str
    x: float
    y: float
    size: float
    angle: float = 0.0
    flip: bool = False
    tint: str | None = None
    opacity: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DrawnText:
    """A word drawn on the canvas: centre and height as fractions, colour by name."""

    text: str
    x: float
    y: float
    size: float
    colour: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Background:
    """The background of a scene.

    Attributes:
      kind: the generator, one of `BACKGROUND_KINDS`.
      colours: names of its one ("flat", "collage") or two colours.
      seed: decides the details.
      placements: the far, blurred things of a "collage"; nobody is asked to recognise them, and
        nothing should be said about them.
    """

    kind: Literal["flat", "gradient", "noise", "texture", "collage"]
    colours: tuple[str, ...]
    seed: int
    placements: tuple[Placement, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SceneSpec:
    """A scene: background, one to eight placements, at most one drawn text."""

    background: Background
    placements: tuple[Placement, ...]
    text: DrawnText | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RenderedObject:
    """The box of a rendered placement and its visible share.

    Attributes:
      box: tight box of the visible pixels, xyxy float pixels; without area if there are none.
      visible: share of the sprite's opaque pixels that are inside the canvas and not covered, in
        [0, 1].
    """

    placement: Placement
    box: tuple[float, float, float, float]
    visible: float
