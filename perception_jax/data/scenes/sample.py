"""Draws a scene's spec at random: what is shown, where, how large, over what background."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from perception_jax.data.scenes import concepts as table
from perception_jax.data.scenes import palette
from perception_jax.data.scenes.concepts import Concept
from perception_jax.data.scenes.render import Silhouettes
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
from perception_jax.data.scenes.words import WORDS
from perception_jax.errors import ConfigError

Split = Literal["train", "test", "held_out"]

COARSE = 64
"""Pixels along the shorter side of the canvas on which overlaps are tried out."""
TRIES = 12
"""Positions tried for an object before it is made smaller."""
SHRINK = 0.75
"""Factor on an object's size after `TRIES` positions that cover too much."""
COLLAGE_PIECES = (5, 10)
COLLAGE_SIZE = (0.18, 0.5)
