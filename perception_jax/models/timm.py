"""timm's `config.json`: a named architecture and its changed arguments.

    {"architecture": "vit_base_patch16_clip_224", "num_classes": 512,
     "model_args": {"img_size": 336}, "pretrained_cfg": {"tag": "openai", "mean": ...}}

The sizes behind a name are code of timm; each family of models keeps a small table of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.settings import Either, Optional, Settings, SettingType, Several

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
"""Activation names of this library by timm's name."""

_FIELDS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "embed_dim": "width",
    "depth": "depth",
    "num_heads": "heads",
    "mlp_ratio": "mlp_ratio",
}
"""Arguments of timm → fields of `Size`."""
_KINDS: dict[str, SettingType] = {
    "patch_size": settings.IMAGE_SIZE,
    "embed_dim": settings.WIDTH,
    "depth": settings.DEPTH,
    "num_heads": settings.HEADS,
    "mlp_ratio": settings.RATIO,
    "act_layer": Optional(settings.TEXT),
    "reg_tokens": settings.REGISTERS,
}
_MEANT = {"img_size", *_KINDS}
_HARMLESS = {
    "num_classes",
    "global_pool",
    "dynamic_img_size",
    "strict_img_size",
    "weight_init",
    "init_values",
    *(f"{part}_rate" for part in ("drop", "pos_drop", "patch_drop", "proj_drop", "attn_drop")),
    "drop_path_rate",
}
"""Change nothing, or what parameters there are, which shows when their names are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmModel:
    """A model description read from timm's settings.

    Attributes:
      architecture: timm's name, without the tag of the weights.
      tag: of the weights, e.g. "openai"; "" if the settings do not say.
      image_size: None if the settings do not say.
      args: how the model differs from the named one, keys as in `timm.create_model`.
    """

    architecture: str
    tag: str
    image_size: int | None
    args: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes of one of timm's named architectures."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0

    def fields(self) -> dict[str, int]:
        """The sizes by the field names of configurations."""
        fields = dataclasses.asdict(self)
        ratio = fields.pop("mlp_ratio")
        return fields | {"mlp_dim": int(self.width * ratio)}


def name(config: Mapping[str, Any]) -> str:
    """Returns the architecture named by a `config.json` of timm, without the tag of the weights."""
    file = Settings(config, "timm's config.json")
    return file.get("architecture", settings.TEXT).partition(".")[0]


def read(config: Mapping[str, Any]) -> TimmModel:
    """Parses a `config.json` of timm, also of the older form without `pretrained_cfg`.

    Raises:
      ConfigError: arguments that make another model than those that are supported, of another
        type or out of range.
    """
    model, weights = Settings(config, "timm's config.json"), pretrained(config)
    architecture, _, tag = model.get("architecture", settings.TEXT).partition(".")
    args = model.section("model_args", optional=True)
    known = _MEANT | _HARMLESS | ({"in_chans"} if args.content.get("in_chans") == 3 else set())
    if unknown := sorted(args.content.keys() - known):
        raise ConfigError(
            f"timm's {architecture}: expected model_args among {', '.join(sorted(_MEANT))}, found "
            f"{', '.join(unknown)!s:.200}, which would make another model."
        )
    return TimmModel(
        architecture=architecture,
        tag=tag or weights.get("tag", Optional(settings.TEXT), None) or "",
        image_size=_image_size(architecture, args, weights),
        args={key: args.get(key, kind) for key, kind in _KINDS.items() if key in args},
    )


def pretrained(config: Mapping[str, Any]) -> Settings:
    """The `pretrained_cfg` of a parsed `config.json`, or the older kind of file itself."""
    model = Settings(config, "timm's config.json")
    return model.section("pretrained_cfg") if "pretrained_cfg" in model else model


def activation(model: TimmModel, default: str) -> str:
    """The activation that `model_args` name, in our spelling.

    Raises:
      ConfigError: one that we do not have.
    """
    name = model.args.get("act_layer")
    if name is None:
        return default
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"timm's {model.architecture}: expected act_layer among {', '.join(ACTIVATIONS)}, "
            f"found {name!r}."
        )
    return ACTIVATIONS[name]


def act_layer(act: str) -> dict[str, str]:
    """The inverse of `activation`."""
    return {"act_layer": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[act]}


def mlp_ratio(width: int, mlp_dim: int) -> float:
    """A ratio that `int(width * ratio)`, as timm and open_clip compute it, makes `mlp_dim` of."""
    exact = mlp_dim / width
    return exact if int(width * exact) == mlp_dim else (mlp_dim + 0.5) / width


def sizes(model: TimmModel, named: Size) -> dict[str, int]:
    """`Size.fields` of the named model, where `model_args` do not replace them."""
    image_size = model.image_size or named.image_size
    changed = {_FIELDS[key]: value for key, value in model.args.items() if key in _FIELDS}
    return dataclasses.replace(named, **(changed | {"image_size": image_size})).fields()


def write(
    architecture: str,
    ours: Mapping[str, int],
    named: Size,
    *,
    classes: int,
    pool: str,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `config.json` that `timm.create_model("local-dir:…")` builds and fills a model from.

    Args:
      ours: our sizes, keys as in `Size.fields`.
      named: those behind the name; what differs goes to `model_args`.
      classes: width of the embedding, 0 without a projection.
      pool: timm's name of the pooling.
      extra: further `model_args`.
    """
    base = named.fields()
    args = {
        theirs: ours[field]
        for theirs, field in _FIELDS.items()
        if field in base and ours[field] != base[field]
    }
    if int(ours["width"] * named.mlp_ratio) != ours["mlp_dim"]:
        args["mlp_ratio"] = mlp_ratio(ours["width"], ours["mlp_dim"])
    args |= extra or {}
    side = ours["image_size"]
    return {
        "architecture": architecture,
        "num_classes": classes,
        "num_features": ours["width"],
        "global_pool": pool,
        **({"model_args": args} if args else {}),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "num_classes": classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _image_size(architecture: str, args: Settings, weights: Settings) -> int | None:
    """The side that arguments or weights name, as one number or as (channels, height, width)."""
    side = settings.IMAGE_SIZE
    if "img_size" in args:
        size = args.get("img_size", Either(side, Several(side, 2, 2)))
    else:
        size = weights.get("input_size", Optional(Several(side, 1, 3)), None)
    sides = size[-2:] if isinstance(size, tuple) else (size,)
    if len(set(sides)) != 1:
        raise ConfigError(f"timm's {architecture}: expected a square img_size, found {sides}.")
    return sides[0]
