"""Backbones: an image tower and a text tower, with a joint space or paired from two models.

CLIP, SigLIP and EVA-CLIP have both. A vision-only encoder (DINOv2) is paired with the text tower of
a CLIP; a method that needs one space trains a projection into the text tower's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx

from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.models.registry import architecture_of
from perception_jax.nn.text_tower import TextConfig, TextTower


@runtime_checkable
class Backbone(Protocol):
    """Protocol of a module with image tower, text tower and temperature (stored as a logarithm)."""

    vision: nnx.Module
    text: TextTower
    logit_scale: nnx.Param


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedConfig:
    """Configuration of a vision-only encoder paired with a text tower."""

    vision: Dinov2Config
    text: TextConfig
    embed_dim: int


class Paired(nnx.Module):
    """A vision-only encoder paired with the text tower of a CLIP, without a joint space."""

    def __init__(self, config: PairedConfig, *, rngs: nnx.Rngs):
        self.vision = Dinov2(config.vision, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(()))


def build_backbone(config: Any, *, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a backbone with fresh parameters."""
    if isinstance(config, PairedConfig):
        return Paired(config, rngs=rngs)
    return architecture_of(config).build(config, rngs=rngs)


def is_joint(backbone: Backbone) -> bool:
    """Whether image and text embeddings share one space."""
    return not isinstance(backbone, Paired)
