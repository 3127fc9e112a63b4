"""Configurations of DINOv2: published sizes and Hugging Face settings both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.settings import Choice, Settings, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dinov2Config:
    """Configuration of DINOv2.

    Attributes:
      image_size: of the stored position grid (518 for the published weights).
      mlp: "mlp" with exact GELU, or "swiglu" (giant).
      registers: extra tokens behind the class token (arXiv 2309.16588); they have no position.
      layer_scale: start value of the residual factors.
      position_offset: added to the grid's side when positions are resized: 0.1 in the authors' code
        (without registers), 0 in Hugging Face, in timm and with registers.
      position_antialias: whether resized positions are antialiased: with registers they are, and in
        timm.

    Raises:
      ConfigError: a field of another type or out of range (see `settings.check_fields`).
    """

    image_size: int = 518
    patch_size: int = 14
    width: int
    depth: int
    heads: int
    mlp_dim: int
    mlp: Literal["mlp", "swiglu"] = "mlp"
    registers: int = 0
    eps: float = 1e-6
    layer_scale: float = 1.0
    position_offset: float = 0.0
    position_antialias: bool = False

    def __post_init__(self) -> None:
        check_fields(self, _KINDS)

    @property
    def positions(self) -> int:
        """Number of stored position embeddings: class token and patches."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def small(cls, registers: int = 0) -> Dinov2Config:
        """ViT-S/14."""
        return cls(width=384, depth=12, heads=6, mlp_dim=1536, **_registers(registers))

    @classmethod
    def base(cls, registers: int = 0) -> Dinov2Config:
        """ViT-B/14."""
        return cls(width=768, depth=12, heads=12, mlp_dim=3072, **_registers(registers))

    @classmethod
    def large(cls, registers: int = 0) -> Dinov2Config:
        """ViT-L/14."""
        return cls(width=1024, depth=24, heads=16, mlp_dim=4096, **_registers(registers))

    @classmethod
    def giant(cls, registers: int = 0) -> Dinov2Config:
        """ViT-g/14, with SwiGLU."""
        return cls(
            width=1536,
            depth=40,
            heads=24,
            mlp_dim=swiglu_dim(1536, 4),
            mlp="swiglu",
            **_registers(registers),
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Dinov2Config:
        """From the `config.json` of a Hugging Face DINOv2 folder (with or without registers).

        Raises:
          ConfigError: a setting that this model does not have, of another type or out of range.
        """
        model = Settings(config, "config.json")
        model.get("hidden_act", Choice(("gelu",)), "gelu")
        model.get("qkv_bias", Choice((True,)), True)
        model.get("num_channels", Choice((3,)), 3)
        width = model.get("hidden_size", settings.WIDTH, 768)
        ratio = model.get("mlp_ratio", settings.RATIO, 4)
        swiglu = model.get("use_swiglu_ffn", settings.FLAG, False)
        return cls(
            image_size=model.get("image_size", settings.IMAGE_SIZE, 224),
            patch_size=model.get("patch_size", settings.IMAGE_SIZE, 14),
            width=width,
            depth=model.get("num_hidden_layers", settings.DEPTH, 12),
            heads=model.get("num_attention_heads", settings.HEADS, 12),
            mlp_dim=swiglu_dim(width, ratio) if swiglu else int(width * ratio),
            mlp="swiglu" if swiglu else "mlp",
            **_registers(model.get("num_register_tokens", settings.REGISTERS, 0)),
            eps=model.get("layer_norm_eps", settings.EPS, 1e-6),
            layer_scale=model.get("layerscale_value", settings.FACTOR, 1.0),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `transformers` loads.

        Raises:
          ConfigError: an MLP width that Hugging Face's ratio cannot express.
        """
        swiglu = self.mlp == "swiglu"
        ratio = round(self.mlp_dim / self.width * (1.5 if swiglu else 1.0))
        expected = swiglu_dim(self.width, ratio) if swiglu else self.width * ratio
        if expected != self.mlp_dim:
            raise ConfigError(
                f"Hugging Face's DINOv2 has MLPs of a whole mlp_ratio; {self.mlp_dim} hidden units "
                f"at width {self.width} are not, so no configuration file can express them."
            )
        kind = "dinov2_with_registers" if self.registers else "dinov2"
        name = "Dinov2WithRegistersModel" if self.registers else "Dinov2Model"
        extra = {"num_register_tokens": self.registers} if self.registers else {}
        return {
            "architectures": [name],
            "model_type": kind,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.heads,
            "mlp_ratio": ratio,
            "use_swiglu_ffn": swiglu,
            "hidden_act": "gelu",
            "qkv_bias": True,
            "layer_norm_eps": self.eps,
            "layerscale_value": self.layer_scale,
            **extra,
        }

    @classmethod
    def from_jax(cls, config: Mapping[str, Any]) -> Dinov2Config:
        """From our own layout: Hugging Face's settings, and how positions are resized.

        Raises:
          ConfigError: as `from_hf`.
        """
        model = Settings(config, "config.json")
        keys = ("position_offset", "position_antialias")
        given = {key: model.get(key, _KINDS[key]) for key in keys if key in model}
        return dataclasses.replace(cls.from_hf(config), **given)

    def to_jax(self) -> dict[str, Any]:
        """The inverse of `from_jax`.

        Raises:
          ConfigError: as `to_hf`.
        """
        return self.to_hf() | {
            "position_offset": self.position_offset,
            "position_antialias": self.position_antialias,
        }


def _registers(count: int) -> dict[str, Any]:
    return {"registers": count, "position_antialias": count > 0}


_KINDS = {
    **settings.IMAGE_TOWER,
    "mlp": Choice(("mlp", "swiglu")),
    "registers": settings.REGISTERS,
    "layer_scale": settings.FACTOR,
    "position_offset": settings.Number(low=0.0, high=1.0),
    "position_antialias": settings.FLAG,
}


def swiglu_dim(width: int, ratio: float | int) -> int:
    """Hidden units of DINOv2's SwiGLU: two thirds of the plain MLP's, rounded up to eights."""
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8
