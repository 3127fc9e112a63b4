"""open_clip's `vision_cfg` and `text_cfg`: what several architectures read and write alike.

open_clip has many settings that change a tower; one that is not understood here is refused, since
the weights of another tower may well have the same names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perception_jax.errors import ConfigError
from perception_jax.nn.text_tower import TextConfig

_COMMON = ("width", "layers", "mlp_ratio", "norm_kwargs")
_NO_EFFECT = ("patch_dropout", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "pad_id")
"""For training and for the tokenizer."""
_DEFAULTS = {
    "vision_cfg": {"pool_type": "tok", "pos_embed_type": "learnable"},
    "text_cfg": {"pool_type": "argmax", "proj_type": "linear", "eos_id": 2},
}


def trunk(settings: Mapping[str, Any]) -> str:
    """timm's name of the image tower; "" for one of open_clip's own."""
    return str(settings.get("model_cfg", settings)["vision_cfg"].get("timm_model_name") or "")


def check(name: str, settings: Mapping[str, Any], meant: tuple[str, ...]) -> None:
    """Refuses settings that would make another tower than the one built here.

    Args:
      name: "vision_cfg" or "text_cfg".
      settings: its content.
      meant: keys that the caller reads, besides those that all towers have.

    Raises:
      ConfigError: a setting that is neither understood nor without effect.
    """
    default = _DEFAULTS[name]
    other = {
        key: value
        for key, value in settings.items()
        if key not in (*_COMMON, *meant, *_NO_EFFECT)
        and value not in (None, False, default.get(key))
    }
    if other:
        raise ConfigError(
            f"open_clip's {name}: expected only {', '.join((*_COMMON, *meant))}, found {other}, "
            "which would make another tower than the one that is built here."
        )


def read_text(text: Mapping[str, Any], *, act: str) -> TextConfig:
    """From a `text_cfg`: the text tower of CLIP and EVA-CLIP.

    Raises:
      ConfigError: it describes another text tower, such as one of Hugging Face.
    """
    check("text_cfg", text, ("context_length", "vocab_size", "heads", "pool_type", "eos_id"))
    pool = text.get("pool_type", "argmax")
    if pool not in ("argmax", "eos"):
        raise ConfigError(
            f"open_clip's text_cfg: expected pool_type 'argmax' or 'eos', found {pool!r}, which "
            "would make another tower than the one that is built here."
        )
    width = text.get("width", 512)
    return TextConfig(
        vocab_size=text.get("vocab_size", 49408),
        context=text.get("context_length", 77),
        width=width,
        depth=text.get("layers", 12),
        heads=text.get("heads", 8),
        mlp_dim=int(width * text.get("mlp_ratio", 4.0)),
        act=act,
        eps=eps(text),
        end_id=text.get("eos_id", 2) if pool == "eos" else None,
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


def eps(tower: Mapping[str, Any]) -> float:
    """The epsilon of a tower's norms."""
    return (tower.get("norm_kwargs") or {}).get("eps", 1e-5)


def norm_kwargs(value: float) -> dict[str, Any]:
    """The inverse of `eps`; nothing for the default."""
    return {} if value == 1e-5 else {"norm_kwargs": {"eps": value}}


def mlp_ratio(width: int, mlp_dim: int) -> float:
    """A ratio that `int(width * ratio)`, as open_clip and timm compute it, makes `mlp_dim` of."""
    exact = mlp_dim / width
    return exact if int(width * exact) == mlp_dim else (mlp_dim + 0.5) / width
