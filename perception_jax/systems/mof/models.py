"""The model of a config: described by settings, planned from published sizes, or opened.

`config.model` names a whole LLaVA, or a language model and one or two image towers.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from perception_jax import api
from perception_jax.api.joined import JoinedWeights
from perception_jax.api.multimodal import as_second_tower, assemble_llava, tower_at
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llava.config import LlavaConfig, dinov2_l14
from perception_jax.models.llava.formats import DINOV2, TOWERS
from perception_jax.models.registry import architecture_of
from perception_jax.models.towers import TowerConfig
from perception_jax.systems.mof.records import learned_vocabulary

PUBLISHED = {
    "liuhaotian/llava-v1.5-7b": LlavaConfig.llava15_7b,
    "liuhaotian/llava-v1.5-13b": LlavaConfig.llava15_13b,
}
"""Configurations of whole models by hub id, which are planned without a connection."""

LEARNED = "learned"
"""Value of `scratch.tokenizer` for one that is learned from the training conversations."""

_PREFIXES = ("vision/", "second_vision/")


def described(config: Any) -> api.Loaded:
    """Configuration and processor, without weights; of known hub ids only settings are fetched.

    Raises:
      CheckpointError: as `perception_jax.load`.
      ConfigError: parts that do not fit together.
    """
    model = _checked(config)
    if model.whole:
        found, processor = api.describe(model.whole)
        return api.without_weights(_as_llava(model.whole, found), processor, name=model.whole)
    if model.language:
        language, tokenizer = api.describe_language(model.language)
    else:
        language, tokenizer = _drawn_language(config)
    found = _llava(config, language)
    return api.without_weights(found, _processor(found, tokenizer), name=model.language)


def planned(config: Any) -> api.Loaded:
    """The model of shapes alone, of published parts without a connection."""
    model = _checked(config)
    if model.whole in PUBLISHED:
        found = PUBLISHED[model.whole]()
    elif model.whole:
        return described(config)
    else:
        source = model.language
        language = api.language_config(source) if source else _drawn_language(config)[0]
        found = _llava(config, language)
    return api.without_weights(found, _processor(found, None), name=model.whole or model.language)


def opened(config: Any) -> api.Loaded:
    """The model with its weights unread. Raises as `described`."""
    model = _checked(config)
    if model.whole:
        found = api.prepare(model.whole)
        _as_llava(model.whole, found.config)
        return found
    if model.language:
        return assemble_llava(
            model.language,
            model.towers,
            projectors=config.projectors or None,
            reference_adapter_collision=config.reference_adapter_collision,
            seed=config.train.seed,
            image_size=model.image_size or None,
            **_settings(config),
        )
    found = described(config)
    weights = {
        prefix: tower_at(tower, model.image_size or None).weights
        for prefix, tower in zip(_PREFIXES, model.towers, strict=False)
    }
    rules = architecture_of(found.config).shardings
    return dataclasses.replace(found, weights=JoinedWeights(parts=weights, rules=rules))


def _checked(config: Any) -> Any:
    """`config.model`, if it says what it has to."""
    model = config.model
    if bool(model.whole) == bool(model.towers):
        raise ConfigError(
            "model: expected a whole LLaVA (model.whole), or a language model and image towers "
            f"(model.language, model.towers), found whole {model.whole!r} and towers "
            f"{tuple(model.towers)}."
        )
    if config.projectors and not model.language:
        raise ConfigError(
            "projectors: expected model.language, for which they were trained, found none."
        )
    if config.projectors and not pathlib.Path(config.projectors).exists():
        raise ConfigError(
            f"projectors: expected a folder or file of stage 1 (WORKDIR/projectors), found nothing "
            f"at {config.projectors}."
        )
    return model


def _settings(config: Any) -> dict[str, Any]:
    """Fields of `LlavaConfig`."""
    names = ("mixing", "mixing_ratio", "projector", "select_layer", "select_feature")
    found = {name: config.model[name] for name in names}
    return found | {"image_aspect": config.model.image_aspect or None}


def _llava(config: Any, language: LlamaConfig) -> LlavaConfig:
    size = config.model.image_size
    towers = [_tower(name, size) for name in config.model.towers]
    second = [as_second_tower(tower) for tower in towers[1:]]
    return LlavaConfig(language=language, towers=(*towers[:1], *second), **_settings(config))


def _tower(name: str, size: int) -> TowerConfig | Dinov2Config:
    known = TOWERS | {DINOV2: dinov2_l14()}
    if name in known and not size:
        return known[name]
    return tower_at(name, size or None).config


def _drawn_language(config: Any) -> tuple[LlamaConfig, Any]:
    sizes = config.scratch.to_dict()
    tokenizer = sizes.pop("tokenizer")
    if tokenizer == LEARNED:
        tokenizer = learned_vocabulary(config, sizes["vocab_size"])
        sizes["vocab_size"] = tokenizer.vocab_size
    return api.drawn_language(sizes, tokenizer)


def _processor(config: LlavaConfig, tokenizer: Any) -> api.Processor:
    settings = architecture_of(config).image_settings(config, "reference")
    return api.Processor(image=ImageProcessor(**settings), tokenizer=tokenizer)


def _as_llava(source: str, config: Any) -> LlavaConfig:
    if not isinstance(config, LlavaConfig):
        raise ConfigError(
            f"model.whole: expected a LLaVA, found {source} with {type(config).__name__}."
        )
    return config
