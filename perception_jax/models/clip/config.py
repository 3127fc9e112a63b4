"""Configurations of CLIP: published sizes, Hugging Face and open_clip settings both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from perception_jax.errors import ConfigError
from perception_jax.nn.text_tower import TextConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower; `act` is one of `nn.mlp.ACTIVATIONS` and belongs to the weights."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    act: str = "quick_gelu"
    eps: float = 1e-5

    @property
    def tokens(self) -> int:
        """Class token and patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Both towers and the width of the joint space."""

    vision: VisionConfig
    text: TextConfig
    embed_dim: int
    logit_scale_init: float = 2.6592

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
    def from_hf(cls, config: Mapping[str, Any]) -> ClipConfig:
        """From the `config.json` of a Hugging Face CLIP folder.

        Keys that a file leaves out take the defaults of `transformers.CLIPConfig`.

        Raises:
          ConfigError: the file lacks a tower, or names an unknown activation.
        """
        towers = {}
        for name in ("vision_config", "text_config"):
            if name not in config:
                raise ConfigError(
                    f"config.json has no {name!r}; expected a Hugging Face CLIP configuration, "
                    f"found the keys {sorted(config)}"
                )
            towers[name] = config[name] or {}
        vision = _HF_VISION_DEFAULTS | dict(towers["vision_config"])
        text = _HF_TEXT_DEFAULTS | dict(towers["text_config"])
        return cls(
            vision=VisionConfig(
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                **_from_hf_tower(vision),
            ),
            text=TextConfig(
                vocab_size=text["vocab_size"],
                context=text["max_position_embeddings"],
                **_from_hf_tower(text),
            ),
            embed_dim=config.get("projection_dim", vision["projection_dim"]),
            logit_scale_init=config.get("logit_scale_init_value", 2.6592),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `transformers.CLIPModel` loads."""
        vision = _to_hf_tower(self.vision) | {
            "model_type": "clip_vision_model",
            "image_size": self.vision.image_size,
            "patch_size": self.vision.patch_size,
            "num_channels": 3,
            "projection_dim": self.embed_dim,
        }
        text = _to_hf_tower(self.text) | {
            "model_type": "clip_text_model",
            "vocab_size": self.text.vocab_size,
            "max_position_embeddings": self.text.context,
            "projection_dim": self.embed_dim,
            "bos_token_id": self.text.vocab_size - 2,
            "eos_token_id": self.text.vocab_size - 1,
            "pad_token_id": self.text.vocab_size - 1,
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
        """From the `model_cfg` of open_clip (an `open_clip_config.json` or a model JSON).

        Raises:
          ConfigError: the configuration describes another architecture (a timm or ResNet trunk).
        """
        config = config.get("model_cfg", config)
        vision, text = config["vision_cfg"], config["text_cfg"]
        if "timm_model_name" in vision or not isinstance(vision.get("layers"), int):
            raise ConfigError(
                "this open_clip configuration has no plain ViT image tower (timm trunk or "
                f"ResNet: {vision}); CLIP expects vision_cfg with integer 'layers' and 'width'"
            )
        act = "quick_gelu" if config.get("quick_gelu") else "gelu"
        return cls(
            vision=VisionConfig(
                image_size=vision.get("image_size", 224),
                patch_size=vision.get("patch_size", 16),
                width=vision.get("width", 768),
                depth=vision["layers"],
                heads=vision.get("width", 768) // vision.get("head_width", 64),
                mlp_dim=int(vision.get("width", 768) * vision.get("mlp_ratio", 4.0)),
                act=act,
            ),
            text=TextConfig(
                vocab_size=text.get("vocab_size", 49408),
                context=text.get("context_length", 77),
                width=text.get("width", 512),
                depth=text.get("layers", 12),
                heads=text.get("heads", 8),
                mlp_dim=int(text.get("width", 512) * text.get("mlp_ratio", 4.0)),
                act=act,
            ),
            embed_dim=config["embed_dim"],
        )

    def to_open_clip(self) -> dict[str, Any]:
        """The `model_cfg` that open_clip builds this model from.

        Raises:
          ConfigError: the towers differ in activation, which open_clip cannot say.
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
            "vision_cfg": {
                "image_size": vision.image_size,
                "layers": vision.depth,
                "width": vision.width,
                "head_width": vision.width // vision.heads,
                "patch_size": vision.patch_size,
                "mlp_ratio": vision.mlp_dim / vision.width,
            },
            "text_cfg": {
                "context_length": text.context,
                "vocab_size": text.vocab_size,
                "width": text.width,
                "heads": text.heads,
                "layers": text.depth,
                "mlp_ratio": text.mlp_dim / text.width,
            },
        }


_HF_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
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
_HF_NAMES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "act": "hidden_act",
    "eps": "layer_norm_eps",
}


def _from_hf_tower(tower: Mapping[str, Any]) -> dict[str, Any]:
    return {ours: tower[theirs] for ours, theirs in _HF_NAMES.items()}


def _to_hf_tower(tower: VisionConfig | TextConfig) -> dict[str, Any]:
    return {theirs: getattr(tower, ours) for ours, theirs in _HF_NAMES.items()}


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
