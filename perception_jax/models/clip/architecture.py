"""CLIP's checkpoints: the whole model, and the image tower alone."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from perception_jax.data.tokenization import (
    ClipTokenizer,
    ForeignVocabularyError,
    PaddedTokenizer,
    check_fits,
)
from perception_jax.models import open_clip, timm, towers
from perception_jax.models.architecture import Architecture, Claim, Files, image_code
from perception_jax.models.clip import timm as clip_timm
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.clip.modeling import Clip, ClipVisionTower
from perception_jax.models.clip.params import TABLES, TOWER_TABLES
from perception_jax.models.towers import TowerConfig


def image_settings(config: Any, layout: str) -> dict[str, Any]:
    """Default image processor of CLIP and EVA-CLIP, also of the image tower alone."""
    return {"size": config.vision.image_size, **image_code(layout)}


def read_tokenizer(files: Files, config: Any) -> ClipTokenizer | None:
    """Reads the tokenizer of CLIP and EVA-CLIP.

    The authors' code contains the vocabulary, so that checkpoints in its layout lack it, unless
    their settings name another.

    Raises:
      CheckpointError: damaged files, or a tokenizer that does not fit the text tower.
    """
    text, where = config.text, "CLIP's own tokenizer"
    reference = files.layout == "reference"
    if (folder := files.folder_with("tokenizer.json", "vocab.json")) is not None:
        try:
            clean, where = "open_clip" if reference else "hf", str(folder)
            tokenizer = ClipTokenizer.from_directory(folder, text.context, clean)
        except ForeignVocabularyError:  # such as BERT's
            return None
    elif reference and open_clip.brings_tokenizer(files.settings, text.vocab_size):
        tokenizer = ClipTokenizer.shipped(context=text.context, pad_id=0)
    else:
        return None
    check_fits(tokenizer, rows=text.vocab_size, end_id=text.end_id, where=where)
    return tokenizer


def with_tokenizer(config: Any, tokenizer: PaddedTokenizer) -> Any:
    """Returns the configuration with the tokenizer's special ids, where it has none of its own.

    Where tokens are after the end token, a tower without the end token's id is read at the largest
    one, and the settings that are written must keep saying so.

    Raises:
      CheckpointError: the tokenizer does not fit the text tower.
    """
    text = config.text
    check_fits(tokenizer, rows=text.vocab_size, end_id=text.end_id)
    known = {text.start_id, text.end_id, text.pad_id} != {None}
    if known or not isinstance(tokenizer, ClipTokenizer):
        return config
    end = tokenizer.end_id
    if end != tokenizer.vocab_size - 1:
        return config
    pad = end if tokenizer.pad_id is None or tokenizer.clean != "hf" else tokenizer.pad_id
    ids = {"start_id": tokenizer.start_id, "end_id": end, "pad_id": pad}
    return dataclasses.replace(config, text=dataclasses.replace(text, **ids))


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
        image_settings=image_settings,
        read_tokenizer=read_tokenizer,
        with_tokenizer=with_tokenizer,
    ),
    Architecture(
        name="clip_vision_model",
        build=functools.partial(towers.build, ClipVisionTower),
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
        image_settings=image_settings,
    ),
)
"""The architectures of this module; see `models.registry`."""
