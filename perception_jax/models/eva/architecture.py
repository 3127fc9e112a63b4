"""EVA-CLIP's checkpoints: the whole model, and its image tower alone."""

from __future__ import annotations

import functools
from typing import Any

from perception_jax.models import open_clip, timm, towers
from perception_jax.models.architecture import Architecture, Claim, Settings
from perception_jax.models.clip.architecture import image_settings, read_tokenizer, with_tokenizer
from perception_jax.models.eva.config import EvaConfig, EvaVisionConfig, is_eva
from perception_jax.models.eva.modeling import Eva, EvaVisionTower
from perception_jax.models.eva.params import TABLES, TOWER_TABLES
from perception_jax.models.towers import TowerConfig


def _read_tower(settings: Settings) -> TowerConfig:
    if "architecture" in settings:
        return TowerConfig(vision=EvaVisionConfig.from_timm(timm.read(settings)))
    return TowerConfig(vision=EvaConfig.from_open_clip(settings).vision)


def _write_tower(config: TowerConfig) -> dict[str, Any]:
    return config.vision.to_timm(None, config.embed_dim)


ARCHITECTURES = (
    Architecture(
        name="eva",
        build=Eva,
        owns=lambda config: isinstance(config, EvaConfig),
        read_config={"reference": EvaConfig.from_open_clip, "jax": EvaConfig.from_open_clip},
        write_config={"reference": EvaConfig.to_open_clip, "jax": EvaConfig.to_jax},
        tables=TABLES,
        claims={
            "reference": Claim(
                lambda settings: open_clip.trunk(settings).startswith("eva"),
                "timm_model_name such as eva02_large_patch14_clip_336",
            )
        },
        parts=("eva_vision_model",),
        image_settings=image_settings,
        read_tokenizer=read_tokenizer,
        with_tokenizer=with_tokenizer,
    ),
    Architecture(
        name="eva_vision_model",
        build=functools.partial(towers.build, EvaVisionTower),
        owns=lambda config: towers.is_tower(config, EvaVisionConfig),
        read_config={"reference": _read_tower, "timm": _read_tower, "jax": _read_tower},
        write_config={"timm": _write_tower, "jax": _write_tower},
        tables=TOWER_TABLES,
        claims={
            "timm": Claim(
                lambda settings: is_eva(timm.name(settings)), "e.g. eva02_large_patch14_clip_336"
            )
        },
        complete=towers.with_projection,
        image_settings=image_settings,
    ),
)
"""The architectures of this module; see `models.registry`."""
