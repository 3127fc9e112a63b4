"""DINOv2 without Hugging Face's settings: sizes read from the tensors themselves, and timm's names.

The authors publish weights without a configuration file; names and shapes tell all of it, since
every published size has heads of 64 channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from perception_jax.errors import ConfigError
from perception_jax.interop.rules import RuleTable
from perception_jax.models import timm
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.params import REFERENCE_RENAMES
from perception_jax.models.timm import Size

_HEAD_WIDTH = 64
_NAME = re.compile(r"vit_(small|base|large|giant)_patch14(_reg4)?_dinov2")
_SIZES = {
    "small": Size(518, 14, 384, 12, 6),
    "base": Size(518, 14, 768, 12, 12),
    "large": Size(518, 14, 1024, 24, 16),
    "giant": Size(518, 14, 1536, 40, 24, 2.66667 * 2),
}


def is_dinov2(architecture: str) -> bool:
    """Whether timm's name is one of a DINOv2."""
    return bool(_NAME.fullmatch(architecture))


def read(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Dinov2Config] | None:
    """Layout and configuration of tensors that need no settings; None for another model's.

    Raises:
      ConfigError: as `from_shapes`.
    """
    rename = RuleTable(rules=(), renames=REFERENCE_RENAMES).rename
    renamed = {rename(name): shape for name, shape in shapes.items()}
    layout = layout_of(renamed)
    return None if layout is None else (layout, from_shapes(renamed, layout))


def layout_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Returns the layout of names: "reference" (the authors'), "timm", or None for neither."""
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= shapes.keys():
        return None
    if not any(name.startswith("blocks.") and name.endswith(".ls1.gamma") for name in shapes):
        return None
    return "reference" if {"mask_token", "register_tokens"} & shapes.keys() else "timm"


def from_shapes(shapes: Mapping[str, tuple[int, ...]], layout: str) -> Dinov2Config:
    """The configuration of tensors named as in `layout`, blocks numbered from 0.

    Raises:
      ConfigError: shapes of no DINOv2, or of one whose number of heads is ambiguous.
    """
    try:
        return _from_shapes(shapes, layout)
    except (KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            "DINOv2: the names of the tensors are those of a DINOv2, but their shapes are not: "
            f"{error!r}. Is the file complete, or is it another model? If it is a variant of your "
            "own, give its `config`."
        ) from error


def _from_shapes(shapes: Mapping[str, tuple[int, ...]], layout: str) -> Dinov2Config:
    patch, width = shapes["patch_embed.proj.weight"][-1], shapes["cls_token"][-1]
    if width % _HEAD_WIDTH:
        raise ValueError(f"width {width} is no multiple of {_HEAD_WIDTH}, the width of a head")
    registers = shapes.get("register_tokens", shapes.get("reg_token", (1, 0)))[1]
    # timm adds the class token's position to the token where there are registers.
    prefix = 0 if layout == "timm" and registers else 1
    side = math.isqrt(shapes["pos_embed"][1] - prefix)
    if side * side + prefix != shapes["pos_embed"][1]:
        raise ValueError(f"{shapes['pos_embed'][1]} positions are no square grid")
    packed, out = ("w12", "w3") if "blocks.0.mlp.w12.weight" in shapes else ("fc1", "fc2")
    hidden = shapes[f"blocks.0.mlp.{out}.weight"][1]
    swiglu = shapes[f"blocks.0.mlp.{packed}.weight"][0] == 2 * hidden
    return Dinov2Config(
        image_size=side * patch,
        patch_size=patch,
        width=width,
        depth=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        heads=width // _HEAD_WIDTH,
        mlp_dim=hidden,
        mlp="swiglu" if swiglu else "mlp",
        registers=registers,
        position_offset=0.1 if layout == "reference" and not registers else 0.0,
        position_antialias=layout == "timm" or registers > 0,
    )


def check_reference(config: Dinov2Config) -> None:
    """Whether `from_shapes` will find this configuration again; the authors have no settings file.

    Raises:
      ConfigError: it would not.
    """
    if config.width != _HEAD_WIDTH * config.heads or config.eps != 1e-6:
        raise ConfigError(
            f"the authors' layout has no settings: heads are {_HEAD_WIDTH} wide and eps is 1e-6; "
            f"found {config.heads} heads at width {config.width} and eps {config.eps}. Export in "
            "the 'hf' layout."
        )


def from_timm(settings: Mapping[str, Any]) -> Dinov2Config:
    """Reads timm's `config.json`.

    Raises:
      ConfigError: no DINOv2 that is supported.
    """
    model = timm.read(settings)
    name, registers = _named(model.architecture)
    if "act_layer" in model.args:
        raise ConfigError(f"DINOv2: expected no act_layer, found {model.args['act_layer']!r}.")
    sizes = timm.sizes(model, _SIZES[name])
    swiglu = name == "giant"
    return Dinov2Config(
        **(sizes | {"mlp_dim": sizes["mlp_dim"] // 2} if swiglu else sizes),
        mlp="swiglu" if swiglu else "mlp",
        registers=model.args.get("reg_tokens", 4 if registers else 0),
        position_antialias=True,
    )


def to_timm(config: Dinov2Config) -> dict[str, Any]:
    """timm's `config.json`; other ways to resize positions are not part of it.

    Raises:
      ConfigError: an epsilon that timm does not have.
    """
    if config.eps != 1e-6:
        raise ConfigError(f"timm's DINOv2 has eps 1e-6, found {config.eps}.")
    swiglu = config.mlp == "swiglu"
    ours = {key: getattr(config, key) for key in _SIZES["small"].fields()}
    ours |= {"mlp_dim": config.mlp_dim * (2 if swiglu else 1)}
    names = ("giant",) if swiglu else ("small", "base", "large")
    name = next((name for name in names if _SIZES[name].fields() == ours), names[0])
    return timm.write(
        f"vit_{name}_patch14{'_reg4' if config.registers else ''}_dinov2",
        ours,
        _SIZES[name],
        classes=0,
        pool="token",
        extra={} if config.registers in (0, 4) else {"reg_tokens": config.registers},
    )


def _named(architecture: str) -> tuple[str, bool]:
    match = _NAME.fullmatch(architecture)
    if match is None:
        raise ConfigError(
            "DINOv2: expected a timm model such as vit_large_patch14_dinov2 or "
            f"vit_base_patch14_reg4_dinov2; found {architecture!r}."
        )
    return match[1], match[2] is not None
