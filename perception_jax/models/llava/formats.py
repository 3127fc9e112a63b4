"""Settings of LLaVA in the layouts of llava-hf ("hf"), of the authors ("reference") and of ours.

The authors' settings name an image tower (`mm_vision_tower`) without its sizes. Those of published
ones are known here; those of others are expected under `vision_config`, and those of a second tower
under `dino_config`, as exports write them. Their code ignores both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.models import registry
from perception_jax.models.architecture import Elsewhere
from perception_jax.models.dinov2 import names as dinov2_names
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llava.config import (
    ASPECT,
    FEATURES,
    LAYER,
    MIXINGS,
    TOKEN,
    LlavaConfig,
    clip_l14,
    dinov2_l14,
    tower_vision,
)
from perception_jax.models.llava.params import SECOND_PROJECTOR, SECOND_TOWER, TOWER
from perception_jax.models.towers import HF_FILE
from perception_jax.settings import Choice, Number, Optional, Settings, Several, shown

VISION, SECOND = "vision_config", "dino_config"
"""Keys of the settings of both image towers."""
TOWERS = {
    "openai/clip-vit-large-patch14": clip_l14(224),
    "openai/clip-vit-large-patch14-336": clip_l14(336),
}
"""Configurations of published image towers by hub id."""
DINOV2 = "facebook/dinov2-large"
"""Hub id of the second tower of arXiv 2401.06209, which its checkpoints do not name."""

_MIXING = "perception_jax_mixing"
"""Key of what the authors' settings cannot express."""
_STRATEGIES = {"default": "patch", "full": "cls_patch"}
_RATIO = Number(low=0.0, high=1.0)


def is_reference(content: Mapping[str, Any], shapes: Mapping[str, Any]) -> bool:
    """Whether settings or names are the authors' and not llava-hf's; both have the `model_type`
    "llava"."""
    for name in shapes:
        if "multi_modal_projector." in name:
            return False
        if "mm_projector." in name:
            return True
    return "text_config" not in content


def from_hf(content: Mapping[str, Any]) -> LlavaConfig:
    """Reads the `config.json` of llava-hf.

    Raises:
      ConfigError: a setting of another type or out of range, several feature layers, or a part that
        is not supported.
    """
    model = Settings(content, HF_FILE)
    model.get("projector_hidden_act", Choice(("gelu",)), "gelu")
    model.get("multimodal_projector_bias", Choice((True,)), True)
    text = model.section("text_config").content
    kind = text.get("model_type", "llama")
    if kind != "llama":
        raise ConfigError(
            f"{HF_FILE}: text_config: expected a language model of the type 'llama', found "
            f"{shown(kind)}, which is not supported in a LLaVA."
        )
    tied = {"tie_word_embeddings": content.get("tie_word_embeddings", False)}
    vision = model.section(VISION).content
    strategy = model.get("vision_feature_select_strategy", Choice((*_STRATEGIES,)), "default")
    return LlavaConfig(
        language=LlamaConfig.from_hf(tied | dict(text)),
        towers=(_read_tower({"model_type": "clip_vision_model"} | dict(vision), "hf"),),
        select_layer=model.get("vision_feature_layer", LAYER, -2),
        select_feature=_STRATEGIES[strategy],
        image_aspect=model.get("image_aspect_ratio", ASPECT, None),
        image_id=model.get("image_token_index", TOKEN, content.get("image_token_id", 32000)),
    )


def to_hf(config: LlavaConfig) -> dict[str, Any]:
    """The `config.json` that `transformers.LlavaForConditionalGeneration` loads.

    Raises:
      ConfigError: two towers, another projector than "mlp2x_gelu", or no id for images.
    """
    if config.mixing != "single" or config.projector != "mlp2x_gelu":
        raise ConfigError(
            "llava-hf has one image tower and the projector 'mlp2x_gelu', found mixing "
            f"{config.mixing!r} and {config.projector!r}. Export as 'reference' or 'jax'."
        )
    if config.image_id is None:
        raise ConfigError(
            "llava-hf needs an id for images, which the authors' vocabulary lacks. Export in the "
            "'reference' layout, or add rows to the vocabulary (`LlavaConfig.with_image_token`)."
        )
    strategies = {ours: theirs for theirs, ours in _STRATEGIES.items()}
    aspect = {} if config.image_aspect is None else {"image_aspect_ratio": config.image_aspect}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": config.language.to_hf(),
        VISION: _write_tower(config.towers[0], "hf"),
        "image_token_index": config.image_id,
        "image_seq_length": config.tokens_per_image,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": strategies[config.select_feature],
        "tie_word_embeddings": config.language.tied,
        "pad_token_id": config.language.pad_id,
        **aspect,
    }


def from_reference(content: Mapping[str, Any]) -> LlavaConfig:
    """Reads the `config.json` of the authors' code; `complete` adds what only names tell.

    Raises:
      ConfigError: a setting of another type or out of range, an image tower of unknown sizes, or a
        way to cut images that is not supported (LLaVA-NeXT).
    """
    model = Settings(content, HF_FILE)
    name = model.get("mm_vision_tower", Optional(settings.TEXT), None)
    if VISION in model:
        first = _read_tower({"model_type": "clip_vision_model"} | dict(content[VISION]), "jax")
    elif name in TOWERS:
        first = TOWERS[name]
    else:
        raise ConfigError(
            f"{HF_FILE}: the sizes of the image tower {shown(name)} (mm_vision_tower) are not "
            f"known here; known are {', '.join(TOWERS)}. Put its settings under {VISION!r}."
        )
    second = (_read_tower(content[SECOND], "jax"),) if SECOND in model else ()
    mixed = model.section(_MIXING, optional=True)
    mixing = mixed.get("mixing", Choice(MIXINGS), "interleaved" if second else "single")
    return LlavaConfig(
        language=LlamaConfig.from_hf(content),
        towers=(first, *second),
        mixing=mixing,
        mixing_ratio=mixed.get("ratio", _RATIO, 0.5),
        projector=model.get("mm_projector_type", settings.TEXT, "linear"),
        select_layer=model.get("mm_vision_select_layer", LAYER, -2),
        select_feature=model.get("mm_vision_select_feature", FEATURES, "patch"),
        image_aspect=model.get("image_aspect_ratio", ASPECT, None),
        image_id=model.get("image_token_index", TOKEN, None),
        image_marks=model.get("mm_use_im_start_end", settings.FLAG, False),
    )


def to_reference(config: LlavaConfig) -> dict[str, Any]:
    """The `config.json` of the authors' code."""
    names = {tower: name for name, tower in TOWERS.items()}
    own = {} if config.image_id is None else {"image_token_index": config.image_id}
    if config.mixing != "single":
        own[_MIXING] = {"mixing": config.mixing, "ratio": config.mixing_ratio}
        own[SECOND] = _write_tower(config.towers[1], "jax")
    return {
        **config.language.to_hf(),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "mm_vision_tower": names.get(config.towers[0]),
        "mm_hidden_size": tower_vision(config.towers[0]).width,
        "mm_projector_type": config.projector,
        "mm_vision_select_layer": config.select_layer,
        "mm_vision_select_feature": config.select_feature,
        "mm_use_im_start_end": config.image_marks,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": config.image_aspect,
        "image_grid_pinpoints": None,
        "use_mm_proj": True,
        VISION: _write_tower(config.towers[0], "jax"),
        **own,
    }


def from_jax(content: Mapping[str, Any]) -> LlavaConfig:
    """Reads the settings of our own layout.

    Raises:
      ConfigError: a setting that is missing, of another type or out of range.
    """
    model = Settings(content, HF_FILE)
    towers = model.get("towers", Several(_Tower(), 1, 2))
    names = {field.name for field in dataclasses.fields(LlavaConfig)} - {"language", "towers"}
    return LlavaConfig(
        language=LlamaConfig.from_hf(model.section("language").content),
        towers=tuple(_read_tower(one, "jax") for one in towers),
        **{name: content[name] for name in names if name in content},
    )


def to_jax(config: LlavaConfig) -> dict[str, Any]:
    """The inverse of `from_jax`."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return fields | {
        "language": config.language.to_hf(),
        "towers": [_write_tower(tower, "jax") for tower in config.towers],
    }


def complete(config: LlavaConfig, shapes: Mapping[str, tuple[int, ...]]) -> LlavaConfig:
    """Adds the second tower that names in the authors' layout tell.

    Raises:
      ConfigError: tensors of a tower that is no DINOv2, or with one projector for both towers,
        whose ratio the settings lack.
    """
    tower = {
        name.removeprefix(SECOND_TOWER): shape
        for name, shape in shapes.items()
        if name.startswith(SECOND_TOWER)
    }
    interleaved = any(name.startswith(SECOND_PROJECTOR) for name in shapes)
    if len(config.towers) == 2 or not (tower or interleaved):
        return config
    if not interleaved:
        raise ConfigError(
            f"LLaVA: the names are those of two image towers with one projector, and the settings "
            f"lack {_MIXING!r}: add {{'mixing': 'additive', 'ratio': …}}, the weight of the first."
        )
    second = dinov2_names.from_shapes(tower, "reference") if tower else dinov2_l14()
    return dataclasses.replace(config, towers=(*config.towers, second), mixing="interleaved")


def elsewhere(content: Mapping[str, Any], shapes: Mapping[str, Any]) -> tuple[Elsewhere, ...]:
    """The image towers that a checkpoint of the authors only names."""
    if not (shapes and is_reference(content, shapes)):
        return ()

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in shapes)

    found = []
    name = content.get("mm_vision_tower")
    if not has(TOWER) and isinstance(name, str):
        found.append(Elsewhere(path="vision/", source=name, key=VISION))
    if has(SECOND_PROJECTOR) and not has(SECOND_TOWER):
        resized = {"position_offset": dinov2_l14().position_offset}
        found.append(Elsewhere(path="second_vision/", source=DINOV2, key=SECOND, settings=resized))
    return tuple(found)


class _Tower:
    """The type of the settings of an image tower, an object."""

    expected = "an object"

    def read(self, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError
        return value


def _read_tower(content: Mapping[str, Any], layout: str) -> Any:
    """The configuration of an image tower from its settings."""
    name = content.get("model_type")
    architecture = registry.find(name) if isinstance(name, str) else None
    if architecture is None:
        raise ConfigError(
            f"{HF_FILE}: expected settings of an image tower, found the model_type {shown(name)}."
        )
    return architecture.read_config[architecture.settings_layout(layout)](content)


def _write_tower(config: Any, layout: str) -> dict[str, Any]:
    """The inverse of `_read_tower`."""
    architecture = registry.architecture_of(config)
    write = architecture.write_config.get(architecture.settings_layout(layout))
    if write is None:
        raise ConfigError(
            f"{architecture.name} has no settings in the layout {layout!r}: export in another one."
        )
    return write(config) | ({"model_type": architecture.name} if layout == "jax" else {})
