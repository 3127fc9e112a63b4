"""SigLIP's checkpoints: the whole model, and its image tower alone."""

from __future__ import annotations

from typing import Any

from perception_jax.data.tokenization import (
    ForeignVocabularyError,
    PaddedTokenizer,
    SiglipTokenizer,
    check_fits,
)
from perception_jax.models import open_clip, timm, towers
from perception_jax.models.architecture import Architecture, Claim, Files, image_code
from perception_jax.models.siglip.config import SiglipConfig, SiglipVisionConfig, is_siglip
from perception_jax.models.siglip.modeling import Siglip, SiglipVisionTower
from perception_jax.models.siglip.params import TABLES, TOWER_TABLES
from perception_jax.models.towers import TowerConfig

_HALF = (0.5, 0.5, 0.5)


def _image_settings(config: Any, layout: str) -> dict[str, Any]:
    shown = {"size": config.vision.image_size, "mean": _HALF, "std": _HALF}
    return {**shown, **image_code(layout), "mode": "squash"}


def _read_tokenizer(files: Files, config: SiglipConfig) -> SiglipTokenizer | None:
    folder = files.folder_with("tokenizer.json", "spiece.model")
    if folder is None:
        return None
    clean = "open_clip" if files.layout == "reference" else "hf"
    try:
        tokenizer = SiglipTokenizer.from_directory(folder, config.text.context, clean)
    except ForeignVocabularyError:  # SigLIP 2 has Gemma's
        return None
    check_fits(tokenizer, rows=config.text.vocab_size, where=str(folder))
    return tokenizer


def _with_tokenizer(config: SiglipConfig, tokenizer: PaddedTokenizer) -> SiglipConfig:
    """SigLIP's settings hold no special ids, and its tower needs none."""
    check_fits(tokenizer, rows=config.text.vocab_size)
    return config


ARCHITECTURES = (
    Architecture(
        name="siglip",
        build=Siglip,
        owns=lambda config: isinstance(config, SiglipConfig),
        read_config={"hf": SiglipConfig.from_hf, "reference": SiglipConfig.from_open_clip},
        write_config={"hf": SiglipConfig.to_hf, "reference": SiglipConfig.to_open_clip},
        tables=TABLES,
        claims={
            "reference": Claim(
                lambda settings: "siglip" in open_clip.trunk(settings),
                "timm_model_name such as vit_so400m_patch14_siglip_384",
            )
        },
        parts=("siglip_vision_model",),
        image_settings=_image_settings,
        read_tokenizer=_read_tokenizer,
        with_tokenizer=_with_tokenizer,
    ),
    Architecture(
        name="siglip_vision_model",
        build=lambda config, *, rngs: SiglipVisionTower(config.vision, rngs=rngs),
        owns=lambda config: towers.is_tower(config, SiglipVisionConfig),
        read_config={
            "hf": lambda s: TowerConfig(
                vision=SiglipVisionConfig.from_hf(s.get("vision_config", s))
            ),
            "reference": lambda s: TowerConfig(vision=SiglipConfig.from_open_clip(s).vision),
            "timm": lambda s: TowerConfig(vision=SiglipVisionConfig.from_timm(timm.read(s))),
        },
        write_config={
            "hf": lambda config: {
                "architectures": ["SiglipVisionModel"],
                **config.vision.to_hf(),
            },
            "timm": lambda config: config.vision.to_timm(),
        },
        tables=TOWER_TABLES,
        claims={
            "timm": Claim(
                lambda settings: is_siglip(timm.name(settings)),
                "with attention pooling, e.g. vit_so400m_patch14_siglip_384",
            )
        },
        image_settings=_image_settings,
    ),
)
"""The architectures of this module; see `models.registry`."""
