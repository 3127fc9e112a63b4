"""Configurations of SigLIP: published sizes, Hugging Face and open_clip settings both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from perception_jax.errors import ConfigError
from perception_jax.nn.text_tower import TextConfig

_SO400M = {"width": 1152, "depth": 27, "heads": 16, "mlp_dim": 4304}
_BASE = {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig:
    """The image tower: a ViT without a class token, pooled by attention.

    `act`: Hugging Face runs the weights with "gelu_pytorch_tanh", as the original code does, and
    open_clip with the exact "gelu"; they differ by about 1e-3.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    act: str = "gelu_pytorch_tanh"
    eps: float = 1e-6

    @property
    def tokens(self) -> int:
        """Patches; pixels that do not fill one are dropped."""
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Both towers; the joint space is as wide as the towers."""

    vision: SiglipVisionConfig
    text: TextConfig

    @property
    def embed_dim(self) -> int:
        """Width of the joint space."""
        return self.vision.width

    @classmethod
    def so400m_224(cls) -> SiglipConfig:
        """SoViT-400m/14, 224 px, 16 text tokens."""
        return _published(224, 14, context=16, **_SO400M)

    @classmethod
    def so400m_384(cls) -> SiglipConfig:
        """SoViT-400m/14, 384 px, 64 text tokens."""
        return _published(384, 14, context=64, **_SO400M)

    @classmethod
    def base_224(cls) -> SiglipConfig:
        """ViT-B/16, 224 px, 64 text tokens."""
        return _published(224, 16, context=64, **_BASE)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> SiglipConfig:
        """From the `config.json` of a Hugging Face SigLIP folder.

        Raises:
          ConfigError: a tower is missing, or the text projection changes the width.
        """
        for name in ("vision_config", "text_config"):
            if name not in config:
                raise ConfigError(
                    f"config.json has no {name!r}; expected a Hugging Face SigLIP configuration, "
                    f"found the keys {sorted(config)}"
                )
        vision = _HF_VISION_DEFAULTS | dict(config["vision_config"] or {})
        text = _HF_TEXT_DEFAULTS | dict(config["text_config"] or {})
        if text.get("projection_size") not in (None, vision["hidden_size"]):
            raise ConfigError(
                f"SigLIP: expected text projection_size {vision['hidden_size']}, the image "
                f"tower's width, found {text['projection_size']}."
            )
        return cls(
            vision=SiglipVisionConfig(
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                **{ours: vision[theirs] for ours, theirs in _HF_NAMES.items()},
            ),
            text=TextConfig(
                vocab_size=text["vocab_size"],
                context=text["max_position_embeddings"],
                pool="last",
                projection_bias=True,
                **{ours: text[theirs] for ours, theirs in _HF_NAMES.items()},
            ),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `transformers.SiglipModel` loads."""
        vision, text = (
            {theirs: getattr(tower, ours) for ours, theirs in _HF_NAMES.items()}
            for tower in (self.vision, self.text)
        )
        vision |= {
            "model_type": "siglip_vision_model",
            "image_size": self.vision.image_size,
            "patch_size": self.vision.patch_size,
            "num_channels": 3,
        }
        text |= {
            "model_type": "siglip_text_model",
            "vocab_size": self.text.vocab_size,
            "max_position_embeddings": self.text.context,
            "projection_size": self.embed_dim,
        }
        return {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "vision_config": vision,
            "text_config": text,
        }

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> SiglipConfig:
        """From the `model_cfg` of open_clip; the trunk's sizes follow from its timm name.

        Keys of `timm_overrides` (as in `timm.create_model`) replace them.

        Raises:
          ConfigError: another trunk.
        """
        overrides = dict(config.get("timm_overrides") or {})
        config = config.get("model_cfg", config)
        vision, text = config["vision_cfg"], config["text_cfg"]
        name = str(vision.get("timm_model_name"))
        if "siglip" not in name:
            raise ConfigError(f"SigLIP: expected a timm SigLIP trunk, found {name!r}.")
        size = _SO400M if "so400m" in name else _BASE
        width = overrides.get("embed_dim", size["width"])
        ratio = size["mlp_dim"] / size["width"]
        return cls(
            vision=SiglipVisionConfig(
                image_size=overrides.get("img_size", vision["image_size"]),
                patch_size=overrides.get("patch_size", 14 if "patch14" in name else 16),
                width=width,
                depth=overrides.get("depth", size["depth"]),
                heads=overrides.get("num_heads", size["heads"]),
                mlp_dim=int(width * overrides.get("mlp_ratio", ratio)),
                act="gelu",
            ),
            text=TextConfig(
                vocab_size=text["vocab_size"],
                context=text["context_length"],
                width=text["width"],
                depth=text["layers"],
                heads=text["heads"],
                mlp_dim=int(text["width"] * text.get("mlp_ratio", 4.0)),
                act="gelu",
                eps=text.get("norm_kwargs", {}).get("eps", 1e-5),
                pool="last",
                projection_bias=True,
            ),
        )

    def to_open_clip(self) -> dict[str, Any]:
        """The `model_cfg` that open_clip builds a published size from.

        Raises:
          ConfigError: open_clip knows no such trunk, or runs it with another activation.
        """
        vision, text = self.vision, self.text
        trunks = {1152: "vit_so400m_patch14_siglip", 768: "vit_base_patch16_siglip"}
        if vision.width not in trunks or vision.act != "gelu":
            raise ConfigError(
                f"open_clip has SigLIP trunks of widths {sorted(trunks)} with the exact GELU; "
                f"found width {vision.width} with {vision.act!r}: export in the 'hf' layout."
            )
        return {
            "embed_dim": self.embed_dim,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {
                "image_size": vision.image_size,
                "timm_model_name": f"{trunks[vision.width]}_{vision.image_size}",
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "text_cfg": {
                "context_length": text.context,
                "vocab_size": text.vocab_size,
                "hf_tokenizer_name": "timm/ViT-SO400M-14-SigLIP",
                "width": text.width,
                "heads": text.heads,
                "layers": text.depth,
                "mlp_ratio": text.mlp_dim / text.width,
                "no_causal_mask": True,
                "proj_bias": True,
                "pool_type": "last",
                "norm_kwargs": {"eps": text.eps},
            },
        }


_HF_NAMES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "act": "hidden_act",
    "eps": "layer_norm_eps",
}
_HF_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_HF_VISION_DEFAULTS = _HF_DEFAULTS | {"image_size": 224, "patch_size": 16}
_HF_TEXT_DEFAULTS = _HF_DEFAULTS | {"vocab_size": 32000, "max_position_embeddings": 64}


def _published(image_size: int, patch_size: int, *, context: int, **size: int) -> SiglipConfig:
    return SiglipConfig(
        vision=SiglipVisionConfig(image_size=image_size, patch_size=patch_size, **size),
        text=TextConfig(
            vocab_size=32000,
            context=context,
            act="gelu_pytorch_tanh",
            eps=1e-6,
            pool="last",
            projection_bias=True,
            **size,
        ),
    )
