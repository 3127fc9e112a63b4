"""Image towers alone, as in a LLaVA or in timm's copies of open_clip models.

The tower is the full model's own `VisionTower`; its paths lack the prefix `vision/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from perception_jax import settings
from perception_jax.interop.rules import LINEAR, RuleTable
from perception_jax.nn.mlp import TOWER_ACTIVATIONS
from perception_jax.settings import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Configuration of an image tower without its text tower.

    Attributes:
      vision: the image tower's own configuration, e.g. `models.clip.config.VisionConfig`.
      embed_dim: width of the joint space; None for a checkpoint without the projection, whose
        embedding is the pooled token.
    """

    vision: Any
    embed_dim: int | None = None

    def __post_init__(self) -> None:
        settings.check_fields(self, {"embed_dim": settings.Optional(settings.WIDTH)})


class Unprojected(nnx.Module):
    """Replaces the projection of a tower without one."""

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return x


HF_FILE = "config.json"
"""Name of Hugging Face's settings in messages."""
_HF_NAMES = {
    "width": ("hidden_size", settings.WIDTH),
    "depth": ("num_hidden_layers", settings.DEPTH),
    "heads": ("num_attention_heads", settings.HEADS),
    "mlp_dim": ("intermediate_size", settings.WIDTH),
    "act": ("hidden_act", settings.Choice(TOWER_ACTIVATIONS)),
    "eps": ("layer_norm_eps", settings.EPS),
}


def read_hf_tower(tower: Settings, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the settings that Hugging Face's CLIP and SigLIP towers share.

    Args:
      defaults: by their names, for keys that are left out.

    Raises:
      ConfigError: a setting of another type or out of range.
    """
    return {
        ours: tower.get(theirs, kind, defaults[theirs])
        for ours, (theirs, kind) in _HF_NAMES.items()
    }


def write_hf_tower(tower: Any) -> dict[str, Any]:
    """The inverse of `read_hf_tower`."""
    return {theirs: getattr(tower, ours) for ours, (theirs, _) in _HF_NAMES.items()}


def is_tower(config: Any, kind: type) -> bool:
    """Whether a configuration is that of an image tower alone of the given type."""
    return isinstance(config, TowerConfig) and isinstance(config.vision, kind)


def build(make: Callable[..., nnx.Module], config: TowerConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a tower with or without projection, according to the width of the joint space."""
    tower = make(config.vision, config.embed_dim or 1, rngs=rngs)
    if config.embed_dim is None:
        tower.projection = Unprojected()
    return tower


def with_projection(
    config: TowerConfig, table: RuleTable, shapes: Mapping[str, tuple[int, ...]]
) -> TowerConfig:
    """The configuration with the joint space's width as the tensors have it.

    No file of settings says whether the projection was saved.
    """
    rules = [rule for rule in table.rules if rule.targets == ("projection/kernel",)]
    if not rules:
        return config
    named = {table.rename(name): shape for name, shape in shapes.items()}
    shape = named.get(rules[0].sources[0])
    if shape is None or len(shape) != 2:
        return dataclasses.replace(config, embed_dim=None)
    outputs = shape[0] if rules[0].transform == LINEAR else shape[1]
    return dataclasses.replace(config, embed_dim=outputs)
