"""CLIP's checkpoints: the whole model, and its image tower alone."""

from __future__ import annotations

import functools
from typing import Any

from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.models import open_clip, timm, towers
from perception_jax.models.architecture import Architecture, Claim, Files, crop_of
from perception_jax.models.clip import timm as clip_timm
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.clip.modeling import Clip, VisionTower
from perception_jax.models.clip.params import TABLES, TOWER_TABLES
from perception_jax.models.towers import TowerConfig


def image_processor(config: Any, layout: str) -> ImageProcessor:
    """Of CLIP and EVA-CLIP, whole or the image tower alone."""
    return ImageProcessor(size=config.vision.image_size, mode=crop_of(layout))


def read_tokenizer(files: Files, config: Any) -> ClipTokenizer | None:
    """Of CLIP and EVA-CLIP. The authors' code brings the vocabulary along, so that checkpoints in
    its layout do not carry it."""
    context = config.text.context
    if (folder := files.folder_with("tokenizer.json", "vocab.json")) is not None:
        return ClipTokenizer.from_directory(folder, context)
    shipped = files.layout == "reference"
    return ClipTokenizer.shipped(context=context, pad_id=0) if shipped else None


def _tower_to_hf(config: TowerConfig) -> dict[str, Any]:
    kind = "CLIPVisionModel" if config.embed_dim is None else "CLIPVisionModelWithProjection"
    width = {} if config.embed_dim is None else {"projection_dim": config.embed_dim}
    return {"architectures": [kind], **config.vision.to_hf(), **width}


ARCHITECTURES = (
    Architecture(
        name="clip",
        build=Clip,
        owns=lambda config: isinstance(config, ClipConfig),
        read_config={"hf": ClipConfig.from_hf, "reference": ClipConfig.from_open_clip},
        write_config={"hf": ClipConfig.to_hf, "reference": ClipConfig.to_open_clip},
        tables=TABLES,
        claims={
            "reference": Claim(
                lambda settings: not open_clip.trunk(settings),
                "a plain ViT image tower: 'layers' and 'width' in vision_cfg",
            )
        },
        read_names=lambda shapes: (
            ("reference", ClipConfig.from_openai(shapes)) if ClipConfig.is_openai(shapes) else None
        ),
        parts=("clip_vision_model",),
        image_processor=image_processor,
        read_tokenizer=read_tokenizer,
    ),
    Architecture(
        name="clip_vision_model",
        build=functools.partial(towers.build, VisionTower),
        owns=lambda config: towers.is_tower(config, VisionConfig),
        read_config={
            "hf": lambda s: TowerConfig(vision=VisionConfig.from_hf(s)),
            "reference": lambda s: TowerConfig(vision=VisionConfig.from_open_clip(s)),
            "timm": lambda s: TowerConfig(vision=clip_timm.read(s)),
        },
        write_config={
            "hf": _tower_to_hf,
            "timm": lambda config: clip_timm.write(config.vision, config.embed_dim),
        },
        tables=TOWER_TABLES,
        claims={
            "timm": Claim(
                lambda settings: clip_timm.is_clip(timm.name(settings)),
                "e.g. vit_large_patch14_clip_336",
            )
        },
        complete=towers.with_projection,
        image_processor=image_processor,
    ),
)
