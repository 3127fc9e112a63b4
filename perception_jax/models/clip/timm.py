"""CLIP's image tower as timm names it: `vit_large_patch14_clip_224.openai` and the like."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from perception_jax.errors import ConfigError
from perception_jax.models import timm
from perception_jax.models.clip.config import VisionConfig
from perception_jax.models.timm import Size
from perception_jax.settings import TEXT, Either, Optional, Several

_NAME = re.compile(r"vit_([a-z]+)_patch(\d+)(_plus)?_clip(_quickgelu)?_(\d+)")
_SIZES = {
    "xsmall": (256, 10, 4, 4.0),
    "medium": (512, 12, 8, 4.0),
    "betwixt": (640, 12, 10, 4.0),
    "base": (768, 12, 12, 4.0),
    "base_plus": (896, 12, 14, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
    "gigantic": (1664, 48, 16, 64 / 13),
}
"""Width, depth, heads, MLP ratio."""
_KNOWN = (
    *(f"vit_base_patch32_clip_{side}" for side in (224, 256, 384, 448)),
    *(f"vit_base_patch16_clip_{side}" for side in (224, 384)),
    *(f"vit_large_patch14_clip_{side}" for side in (224, 336)),
    *(f"vit_huge_patch14_clip_{side}" for side in (224, 336, 378)),
    *(f"vit_gigantic_patch14_clip_{side}" for side in (224, 378)),
    "vit_giant_patch14_clip_224",
    "vit_base_patch16_plus_clip_240",
    *(f"vit_base_patch{patch}_clip_quickgelu_224" for patch in (16, 32)),
    *(f"vit_large_patch14_clip_quickgelu_{side}" for side in (224, 336)),
    *(f"vit_huge_patch14_clip_quickgelu_{side}" for side in (224, 378)),
    "vit_gigantic_patch14_clip_quickgelu_224",
)
"""Names that exports use; a model of other sizes is written as a B/16 with differences."""
_QUICK_GELU_TAGS = ("openai", "dfn2b", "dfn5b", "metaclip_400m", "metaclip_2pt5b")
"""Weights trained with quick-GELU, though timm also offers them under names that run with GELU."""


_NOTES = Optional(Either(TEXT, Several(TEXT, 0, 64)))


def is_clip(architecture: str) -> bool:
    """Whether timm's name is one of a CLIP image tower."""
    return bool(_NAME.fullmatch(architecture))


def read(settings: Mapping[str, Any]) -> VisionConfig:
    """Reads timm's `config.json`; the activation is that of the weights' training.

    Raises:
      ConfigError: sizes or an activation that are not supported.
    """
    model = timm.read(settings)
    notes = str(timm.pretrained(settings).get("notes", _NOTES, "")).lower()
    native = model.tag in _QUICK_GELU_TAGS or "quickgelu" in notes
    default = "quick_gelu" if native or "_quickgelu_" in model.architecture else "gelu"
    sizes = timm.sizes(model, _named(model.architecture))
    return VisionConfig(**sizes, act=timm.activation(model, default))


def write(vision: VisionConfig, embed_dim: int | None) -> dict[str, Any]:
    """timm's `config.json`.

    Raises:
      ConfigError: an epsilon that timm's towers do not have.
    """
    if vision.eps != 1e-5:
        raise ConfigError(
            f"timm's CLIP towers have eps 1e-5, found {vision.eps}: export in the 'hf' layout."
        )
    ours = {key: value for key, value in dataclasses.asdict(vision).items() if key != "eps"}
    act = ours.pop("act")
    quick = "quickgelu_" if act == "quick_gelu" else ""
    fitting = [
        name
        for name in _KNOWN
        if _named(name).fields() == ours and ("quickgelu" in name) == bool(quick)
    ]
    name = fitting[0] if fitting else f"vit_base_patch16_clip_{quick}224"
    extra = timm.act_layer(act) if act not in ("quick_gelu", "gelu") else {}
    return timm.write(name, ours, _named(name), classes=embed_dim or 0, pool="token", extra=extra)


def _named(architecture: str) -> Size:
    match = _NAME.fullmatch(architecture)
    word = match[1] + (match[3] or "") if match else None
    if word not in _SIZES:
        raise ConfigError(
            f"timm: expected a CLIP tower of the size {', '.join(_SIZES)}, found {architecture!r}."
        )
    width, depth, heads, ratio = _SIZES[word]
    return Size(int(match[5]), int(match[2]), width, depth, heads, ratio)
