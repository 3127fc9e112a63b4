"""Configurations of EVA-CLIP: EVA01-g, EVA02-B, -L, -E and -E-plus, as open_clip builds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from perception_jax.errors import ConfigError
from perception_jax.nn.text_tower import TextConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaVisionConfig:
    """The image tower.

    Attributes:
      kind: "eva01" is a pre-norm ViT; "eva02_post_norm" (E) normalises each step's output;
        "eva02_rope" (B, L) has rotary positions, SwiGLU and inner norms. The first two have the
        same parameter names: only the configuration tells them apart.
      reference_grid: grid on which rotary positions are measured, whatever the image size.
    """

    kind: Literal["eva01", "eva02_post_norm", "eva02_rope"]
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    eps: float = 1e-6
    reference_grid: tuple[int, int] = (16, 16)

    @property
    def tokens(self) -> int:
        """Class token and patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """Both towers and the width of the joint space; `trunk` is timm's name of the image tower."""

    vision: EvaVisionConfig
    text: TextConfig
    embed_dim: int
    trunk: str

    @classmethod
    def eva01_g14(cls) -> EvaConfig:
        """EVA01-g/14, 224 px."""
        return _published("eva_giant_patch14_224", 224, embed=1024, text=(768, 12, 12))

    @classmethod
    def eva01_g14_plus(cls) -> EvaConfig:
        """EVA01-g/14-plus, 224 px."""
        return _published("eva_giant_patch14_224", 224, embed=1024, text=(1024, 24, 16))

    @classmethod
    def eva02_b16(cls) -> EvaConfig:
        """EVA02-B/16, 224 px."""
        return _published("eva02_base_patch16_clip_224", 224, embed=512, text=(512, 12, 8))

    @classmethod
    def eva02_l14(cls) -> EvaConfig:
        """EVA02-L/14, 224 px."""
        return _published("eva02_large_patch14_clip_224", 224, embed=768, text=(768, 12, 12))

    @classmethod
    def eva02_l14_336(cls) -> EvaConfig:
        """EVA02-L/14, 336 px."""
        return _published("eva02_large_patch14_clip_336", 336, embed=768, text=(768, 12, 12))

    @classmethod
    def eva02_e14(cls) -> EvaConfig:
        """EVA02-E/14, 224 px."""
        return _published("eva02_enormous_patch14_clip_224", 224, embed=1024, text=(1024, 24, 16))

    @classmethod
    def eva02_e14_plus(cls) -> EvaConfig:
        """EVA02-E/14-plus, 224 px."""
        return _published("eva02_enormous_patch14_clip_224", 224, embed=1024, text=(1280, 32, 20))

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> EvaConfig:
        """From the `model_cfg` of open_clip; the trunk's sizes follow from its timm name.

        Keys of `timm_overrides` (as in `timm.create_model`) replace them.

        Raises:
          ConfigError: a trunk that is no EVA of ours.
        """
        overrides = dict(config.get("timm_overrides") or {})
        config = config.get("model_cfg", config)
        vision, text = config["vision_cfg"], config["text_cfg"]
        trunk = str(vision.get("timm_model_name"))
        image_size = overrides.get("img_size", vision.get("image_size", 224))
        return cls(
            vision=_vision(trunk, image_size, overrides),
            text=TextConfig(
                vocab_size=text.get("vocab_size", 49408),
                context=text.get("context_length", 77),
                width=text["width"],
                depth=text["layers"],
                heads=text["heads"],
                mlp_dim=int(text["width"] * text.get("mlp_ratio", 4.0)),
                act="gelu",
            ),
            embed_dim=config["embed_dim"],
            trunk=trunk,
        )

    def to_open_clip(self) -> dict[str, Any]:
        """The `model_cfg` that open_clip builds this model from.

        Raises:
          ConfigError: sizes that differ from those of the named timm trunk.
        """
        vision, text = self.vision, self.text
        if vision != _vision(self.trunk, vision.image_size, {}):
            raise ConfigError(
                f"open_clip takes the sizes of {self.trunk!r} from timm; this tower has others: "
                f"{vision}, which no configuration file can say."
            )
        return {
            "embed_dim": self.embed_dim,
            "custom_text": True,
            "vision_cfg": {
                "image_size": vision.image_size,
                "timm_model_name": self.trunk,
                "timm_model_pretrained": False,
                "timm_pool": "token",
                "timm_proj": None,
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


@dataclasses.dataclass(frozen=True)
class _Trunk:
    kind: str
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float


_TRUNKS = {
    "eva_giant": _Trunk("eva01", 14, 1408, 40, 16, 6144 / 1408),
    "eva02_enormous": _Trunk("eva02_post_norm", 14, 1792, 64, 16, 15360 / 1792),
    "eva02_large": _Trunk("eva02_rope", 14, 1024, 24, 16, 4 * 2 / 3),
    "eva02_base": _Trunk("eva02_rope", 16, 768, 12, 12, 4 * 2 / 3),
}
"""By the beginning of timm's model name."""


def _vision(trunk: str, image_size: int, overrides: Mapping[str, Any]) -> EvaVisionConfig:
    known = next((size for name, size in _TRUNKS.items() if trunk.startswith(name)), None)
    if known is None:
        raise ConfigError(
            f"EVA: expected a timm trunk that begins with {', '.join(_TRUNKS)}; found {trunk!r}."
        )
    width = overrides.get("embed_dim", known.width)
    return EvaVisionConfig(
        kind=known.kind,
        image_size=image_size,
        patch_size=overrides.get("patch_size", known.patch_size),
        width=width,
        depth=overrides.get("depth", known.depth),
        heads=overrides.get("num_heads", known.heads),
        mlp_dim=int(width * overrides.get("mlp_ratio", known.mlp_ratio)),
    )


def _published(trunk: str, image_size: int, *, embed: int, text: tuple[int, int, int]) -> EvaConfig:
    width, depth, heads = text
    return EvaConfig(
        vision=_vision(trunk, image_size, {}),
        text=TextConfig(width=width, depth=depth, heads=heads, mlp_dim=4 * width, act="gelu"),
        embed_dim=embed,
        trunk=trunk,
    )
