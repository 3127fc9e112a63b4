"""Configurations of CLIP: published sizes, Hugging Face and open_clip settings both ways."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.models import open_clip, timm
from perception_jax.models.towers import HF_FILE, read_hf_tower, write_hf_tower
from perception_jax.nn.mlp import TOWER_ACTIVATIONS
from perception_jax.nn.text_tower import TextConfig
from perception_jax.settings import Choice, Integer, Optional, Settings, check_fields, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Configuration of CLIP's image tower; `act` is one of `nn.mlp.TOWER_ACTIVATIONS`.

    Raises:
      ConfigError: a field of another type or out of range (see `settings.check_fields`).
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    act: str = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_fields(self, {**settings.IMAGE_TOWER, "act": Choice(TOWER_ACTIVATIONS)})

    @property
    def tokens(self) -> int:
        """Number of tokens: class token and patches."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Reads Hugging Face's `config.json`, its `vision_config`, or that of a tower alone.

        Keys that are left out take the defaults of `transformers.CLIPVisionConfig`.

        Raises:
          ConfigError: a setting of another type or out of range.
        """
        tower = _hf_tower(Settings(config, HF_FILE), "vision_config", _HF_VISION_DEFAULTS)
        tower.get("num_channels", Choice((3,)), 3)
        return cls(
            image_size=tower.get("image_size", settings.IMAGE_SIZE, 224),
            patch_size=tower.get("patch_size", settings.IMAGE_SIZE, 32),
            **read_hf_tower(tower, _HF_VISION_DEFAULTS),
        )

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        return write_hf_tower(self) | {
            "model_type": "clip_vision_model",
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "num_channels": 3,
        }

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> VisionConfig:
        """Reads a `model_cfg` of open_clip.

        Raises:
          ConfigError: it describes another image tower (a timm or ResNet trunk, other pooling), or
            a setting is of another type or out of range.
        """
        model = open_clip.model_settings(config)
        vision = model.section("vision_cfg")
        if "timm_model_name" in vision or not isinstance(vision.content.get("layers"), int):
            raise ConfigError(
                "this open_clip configuration has no plain ViT image tower (timm trunk or ResNet: "
                f"{shown(vision.content)}); CLIP expects vision_cfg with integer 'layers' and "
                "'width'"
            )
        open_clip.check(vision, ("image_size", "patch_size", "head_width"))
        width = vision.get("width", settings.WIDTH, 768)
        return cls(
            image_size=vision.get("image_size", settings.IMAGE_SIZE, 224),
            patch_size=vision.get("patch_size", settings.IMAGE_SIZE, 16),
            width=width,
            depth=vision.get("layers", settings.DEPTH),
            heads=width // vision.get("head_width", settings.WIDTH, 64),
            mlp_dim=int(width * vision.get("mlp_ratio", settings.RATIO, 4.0)),
            act="quick_gelu" if model.get("quick_gelu", settings.FLAG, False) else "gelu",
            eps=open_clip.eps(vision),
        )

    def to_open_clip(self) -> dict[str, Any]:
        """The `vision_cfg` of open_clip; the activation is next to it."""
        return {
            "image_size": self.image_size,
            "layers": self.depth,
            "width": self.width,
            "head_width": self.width // self.heads,
            "patch_size": self.patch_size,
            "mlp_ratio": timm.mlp_ratio(self.width, self.mlp_dim),
            **open_clip.norm_kwargs(self.eps),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Configuration of CLIP: both towers and the width of the joint space."""

    vision: VisionConfig
    text: TextConfig
    embed_dim: int
    logit_scale_init: float = 2.6592

    def __post_init__(self) -> None:
        check_fields(self, {"embed_dim": settings.WIDTH, "logit_scale_init": settings.FACTOR})

    @classmethod
    def vit_b32(cls) -> ClipConfig:
        """OpenAI ViT-B/32, 224 px."""
        return _openai(patch=32, width=768, depth=12, heads=12, text_width=512, embed=512)

    @classmethod
    def vit_b16(cls) -> ClipConfig:
        """OpenAI ViT-B/16, 224 px."""
        return _openai(patch=16, width=768, depth=12, heads=12, text_width=512, embed=512)

    @classmethod
    def vit_l14(cls) -> ClipConfig:
        """OpenAI or MetaCLIP ViT-L/14, 224 px."""
        return _openai(patch=14, width=1024, depth=24, heads=16, text_width=768, embed=768)

    @classmethod
    def vit_l14_336(cls) -> ClipConfig:
        """OpenAI ViT-L/14 at 336 px."""
        config = cls.vit_l14()
        return dataclasses.replace(
            config, vision=dataclasses.replace(config.vision, image_size=336)
        )

    @classmethod
    def vit_h14(cls) -> ClipConfig:
        """DFN or MetaCLIP ViT-H/14, 224 px; LAION's has the activation "gelu"."""
        return cls(
            vision=VisionConfig(
                image_size=224, patch_size=14, width=1280, depth=32, heads=16, mlp_dim=5120
            ),
            text=TextConfig(width=1024, depth=24, heads=16, mlp_dim=4096),
            embed_dim=1024,
        )

    @classmethod
    def vit_h14_378(cls) -> ClipConfig:
        """DFN ViT-H/14 at 378 px."""
        config = cls.vit_h14()
        return dataclasses.replace(
            config, vision=dataclasses.replace(config.vision, image_size=378)
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ClipConfig:
        """Reads the `config.json` of a Hugging Face CLIP folder.

        Keys that a file leaves out take the defaults of `transformers.CLIPConfig`.

        Raises:
          ConfigError: the file lacks a tower, or a setting is of another type or out of range.
        """
        model, width = Settings(config, HF_FILE), settings.WIDTH
        for name in ("vision_config", "text_config"):
            if name not in model and f"{name}_dict" not in model:
                raise ConfigError(
                    f"config.json has no {name!r}; expected a Hugging Face CLIP configuration, "
                    f"found the keys {shown(sorted(model.content))}"
                )
        vision = model.section("vision_config", optional=True)
        text = _hf_tower(model, "text_config", _HF_TEXT_DEFAULTS)
        vocab_size = text.get("vocab_size", settings.VOCABULARY, 49408)
        return cls(
            vision=VisionConfig.from_hf(config),
            text=TextConfig(
                vocab_size=vocab_size,
                context=text.get("max_position_embeddings", settings.CONTEXT, 77),
                **read_hf_tower(text, _HF_TEXT_DEFAULTS),
                **_from_hf_ids(text, vocab_size),
            ),
            embed_dim=model.get("projection_dim", width, vision.get("projection_dim", width, 512)),
            logit_scale_init=model.get("logit_scale_init_value", settings.FACTOR, 2.6592),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `transformers.CLIPModel` loads.

        Raises:
          ConfigError: an end token with the id 2, which Hugging Face takes for "the largest id".
        """
        vision = self.vision.to_hf() | {"projection_dim": self.embed_dim}
        text = write_hf_tower(self.text) | {
            "model_type": "clip_text_model",
            "vocab_size": self.text.vocab_size,
            "max_position_embeddings": self.text.context,
            "projection_dim": self.embed_dim,
            **_to_hf_ids(self.text),
        }
        return {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.embed_dim,
            "logit_scale_init_value": self.logit_scale_init,
            "vision_config": vision,
            "text_config": text,
        }

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> ClipConfig:
        """Reads the `model_cfg` of open_clip (an `open_clip_config.json` or a model JSON).

        Raises:
          ConfigError: the configuration describes another architecture, such as a timm or ResNet
            trunk, or a text tower of Hugging Face.
        """
        model = open_clip.model_settings(config)
        vision = VisionConfig.from_open_clip(config)
        return cls(
            vision=vision,
            text=open_clip.read_text(model.section("text_cfg"), act=vision.act),
            embed_dim=model.get("embed_dim", settings.WIDTH),
        )

    @staticmethod
    def is_openai(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the tensors are from OpenAI's own archives, which need no settings."""
        marks = {"input_resolution", "context_length", "vocab_size", "visual.proj"}
        return marks <= shapes.keys()

    @classmethod
    def from_openai(cls, shapes: Mapping[str, tuple[int, ...]]) -> ClipConfig:
        """Derives the configuration from tensors of OpenAI's own archives, whose heads are 64 wide.

        Raises:
          ConfigError: tensors of another model.
        """

        def tower(prefix: str, width: int) -> dict[str, int]:
            names = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
            return {
                "width": width,
                "depth": 1 + max(int(name.split(".")[0]) for name in names),
                "heads": width // 64,
                "mlp_dim": shapes[f"{prefix}0.mlp.c_fc.weight"][0],
            }

        try:
            width, _, _, patch = shapes["visual.conv1.weight"]
            side = math.isqrt(shapes["visual.positional_embedding"][0] - 1)
            vocab_size, text_width = shapes["token_embedding.weight"]
            return cls(
                vision=VisionConfig(
                    image_size=side * patch,
                    patch_size=patch,
                    **tower("visual.transformer.resblocks.", width),
                ),
                text=TextConfig(
                    vocab_size=vocab_size,
                    context=shapes["positional_embedding"][0],
                    **tower("transformer.resblocks.", text_width),
                ),
                embed_dim=shapes["text_projection"][1],
            )
        except (KeyError, ValueError, IndexError) as error:
            raise ConfigError(
                "expected the tensors of a CLIP as OpenAI published it, found names of one with "
                f"other shapes: {error!r}. Is the file complete? For a variant, give its `config`."
            ) from error

    def to_open_clip(self) -> dict[str, Any]:
        """The `model_cfg` that open_clip builds this model from.

        Raises:
          ConfigError: the towers differ in activation, which open_clip cannot express.
        """
        vision, text = self.vision, self.text
        if vision.act != text.act or vision.act not in ("quick_gelu", "gelu"):
            raise ConfigError(
                f"open_clip has one activation for both towers, 'quick_gelu' or 'gelu'; found "
                f"{vision.act!r} and {text.act!r}: export in the 'hf' layout instead"
            )
        return {
            "embed_dim": self.embed_dim,
            "quick_gelu": vision.act == "quick_gelu",
            "vision_cfg": vision.to_open_clip(),
            "text_cfg": open_clip.write_text(text),
        }


_HF_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_HF_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_END_ID, _LARGEST = 49407, 2
"""Default of `eos_token_id`, and its value in files from before it was read."""
_ID = Integer(0, 2**31 - 1)


def _hf_tower(model: Settings, name: str, defaults: Mapping[str, Any]) -> Settings:
    """The settings of one tower: of a whole `config.json`, or as they are.

    As in `transformers`, an old `vision_config_dict` or `text_config_dict` replaces what stands in
    `vision_config` or `text_config`, with the defaults of the keys that it leaves out.
    """
    old = f"{name}_dict"
    if name not in model and old not in model:
        return model
    tower = model.section(name, optional=True)
    if model.content.get(old) is None:
        return tower
    replaced = {**tower.content, **defaults, **model.section(old).content}
    return Settings(replaced, f"{HF_FILE}: {old}")


def _from_hf_ids(text: Settings, vocab_size: int) -> dict[str, int | None]:
    """Special ids. `eos_token_id` 2 means the largest id, as in `transformers`; so does its default
    in a smaller vocabulary, which `transformers` also writes where nobody set it."""
    end = text.get("eos_token_id", _ID, _END_ID)
    if end == _END_ID >= vocab_size:
        end = _LARGEST
    others = {
        ours: text.get(theirs, Optional(_ID), None)
        for ours, theirs in (("start_id", "bos_token_id"), ("pad_id", "pad_token_id"))
    }
    return {"end_id": None if end == _LARGEST else end, **others}


def _to_hf_ids(text: TextConfig) -> dict[str, int]:
    if text.end_id == _LARGEST:
        raise ConfigError(
            f"Hugging Face reads a text tower whose eos_token_id is {_LARGEST} at the largest id; "
            f"this one has its end token there: export in the 'reference' layout."
        )
    end = _LARGEST if text.end_id is None else text.end_id
    ids = {"bos_token_id": text.start_id, "eos_token_id": end, "pad_token_id": text.pad_id}
    return {name: value for name, value in ids.items() if value is not None}


def _openai(
    *, patch: int, width: int, depth: int, heads: int, text_width: int, embed: int
) -> ClipConfig:
    return ClipConfig(
        vision=VisionConfig(
            image_size=224,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=heads,
            mlp_dim=4 * width,
        ),
        text=TextConfig(width=text_width, depth=12, heads=text_width // 64, mlp_dim=4 * text_width),
        embed_dim=embed,
    )
