"""open_clip's `vision_cfg` and `text_cfg`, shared by several architectures.

open_clip has many settings that change a tower; one that is not understood here is refused, since
the weights of another tower may well have the same names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.models import timm
from perception_jax.models.timm import mlp_ratio
from perception_jax.nn.text_tower import TextConfig
from perception_jax.settings import Optional, Settings, shown

TIMM_KEYS = ("timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj")
"""Keys of a `vision_cfg` with a timm trunk."""
IN_FOLDER = "in-this-folder"
"""`hf_tokenizer_name` for tokenizer files next to the weights, which open_clip reads from a local
folder whatever the name."""
CLIP_VOCAB_SIZE = 49408
"""Default vocabulary size of open_clip's text towers."""
_COMMON = ("width", "layers", "mlp_ratio", "norm_kwargs")
_NO_EFFECT = ("patch_dropout", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id")
"""Keys that affect only training or the tokenizer."""
_DEFAULTS = {
    "vision_cfg": {"pool_type": "tok", "pos_embed_type": "learnable"},
    "text_cfg": {"pool_type": "argmax", "proj_type": "linear", "eos_id": 2},
}


def model_settings(config: Mapping[str, Any]) -> Settings:
    """The `model_cfg` of an `open_clip_config.json`, or a model JSON itself.

    Raises:
      ConfigError: it is no object.
    """
    file = Settings(config, "open_clip_config.json")
    return file.section("model_cfg") if "model_cfg" in file else file


def trunk(config: Mapping[str, Any]) -> str:
    """timm's name of the image tower; "" for one of open_clip's own."""
    vision = model_settings(config).section("vision_cfg")
    return vision.get("timm_model_name", Optional(settings.TEXT), None) or ""


def timm_trunk(config: Mapping[str, Any], *, image_size: int | None = None) -> timm.TimmModel:
    """The image trunk that a configuration names as timm does.

    Keys of `timm_overrides` next to the `model_cfg` (as in `timm.create_model`) replace its sizes.

    Args:
      image_size: where the configuration does not say; None for that of timm's name.

    Raises:
      ConfigError: there is none, or a setting is of another type or out of range.
    """
    vision = model_settings(config).section("vision_cfg")
    size = vision.get("image_size", settings.IMAGE_SIZE, image_size)
    return timm.read(
        {
            "architecture": vision.get("timm_model_name", settings.TEXT),
            "input_size": None if size is None else [size],
            "model_args": config.get("timm_overrides"),
        }
    )


def brings_tokenizer(config: Mapping[str, Any], vocab_size: int) -> bool:
    """Whether open_clip reads texts with its own tokenizer, CLIP's, as it does unless the settings
    name or change one."""
    text = model_settings(config).section("text_cfg", optional=True)
    named = text.get("hf_tokenizer_name", Optional(settings.TEXT), None)
    changes = dict(text.section("tokenizer_kwargs", optional=True).content)
    clean = changes.pop("clean", "lower")
    return not (named or changes) and clean == "lower" and vocab_size == CLIP_VOCAB_SIZE


def check(tower: Settings, meant: tuple[str, ...]) -> None:
    """Raises an error for settings of unsupported variants of the towers.

    Args:
      tower: "vision_cfg" or "text_cfg".
      meant: keys that the caller reads, besides those that all towers have.

    Raises:
      ConfigError: a setting that is neither understood nor without effect.
    """
    name = tower.where.rpartition(" ")[2]
    default = _DEFAULTS[name]
    other = {
        key: value
        for key, value in tower.content.items()
        if key not in (*_COMMON, *meant, *_NO_EFFECT)
        and value not in (None, False, default.get(key))
    }
    if other:
        raise ConfigError(
            f"open_clip's {name}: expected only {', '.join((*_COMMON, *meant))}, found "
            f"{shown(other)}, which would make another tower than the supported one."
        )


def read_text(text: Settings, *, act: str) -> TextConfig:
    """Reads the text tower of CLIP and EVA-CLIP from a `text_cfg`.

    Raises:
      ConfigError: it describes another text tower, such as one of Hugging Face.
    """
    check(text, ("context_length", "vocab_size", "heads", "pool_type", "eos_id"))
    pool = text.get("pool_type", settings.TEXT, "argmax")
    if pool not in ("argmax", "eos"):
        raise ConfigError(
            f"open_clip's text_cfg: expected pool_type 'argmax' or 'eos', found {shown(pool)}, "
            "which would make another tower than the supported one."
        )
    end = text.get("eos_id", settings.Integer(0, 2**31 - 1), 2)
    width = text.get("width", settings.WIDTH, 512)
    return TextConfig(
        vocab_size=text.get("vocab_size", settings.VOCABULARY, 49408),
        context=text.get("context_length", settings.CONTEXT, 77),
        width=width,
        depth=text.get("layers", settings.DEPTH, 12),
        heads=text.get("heads", settings.HEADS, 8),
        mlp_dim=int(width * text.get("mlp_ratio", settings.RATIO, 4.0)),
        act=act,
        eps=eps(text),
        end_id=end if pool == "eos" else None,
    )


def write_text(text: TextConfig) -> dict[str, Any]:
    """The inverse of `read_text`; an end token that is the largest id is read by "argmax"."""
    by_id = text.pool == "end" and text.end_id not in (None, text.vocab_size - 1)
    return {
        **({"pool_type": "eos", "eos_id": text.end_id} if by_id else {}),
        "context_length": text.context,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
        "mlp_ratio": mlp_ratio(text.width, text.mlp_dim),
        **norm_kwargs(text.eps),
    }


def eps(tower: Settings) -> float:
    """The epsilon of a tower's norms."""
    norms = tower.section("norm_kwargs", optional=True)
    norms.refuse_others(("eps",))
    return norms.get("eps", settings.EPS, 1e-5)


def norm_kwargs(value: float) -> dict[str, Any]:
    """The inverse of `eps`; nothing for the default."""
    return {} if value == 1e-5 else {"norm_kwargs": {"eps": value}}
