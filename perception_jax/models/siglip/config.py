"""Configurations of SigLIP: published sizes, Hugging Face and open_clip settings both ways."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.models import open_clip, timm
from perception_jax.models.open_clip import TIMM_KEYS
from perception_jax.models.towers import HF_FILE, read_hf_tower, write_hf_tower
from perception_jax.nn.mlp import TOWER_ACTIVATIONS
from perception_jax.nn.text_tower import TextConfig
from perception_jax.settings import Choice, Settings, check_fields, shown

_SO400M = {"width": 1152, "depth": 27, "heads": 16, "mlp_dim": 4304}
_BASE = {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipVisionConfig:
    """Configuration of SigLIP's image tower: a ViT without class token, pooled by attention.

    `act`: Hugging Face runs the weights with "gelu_pytorch_tanh", as the original code does, and
    open_clip with the exact "gelu"; they differ by about 1e-3.

    Raises:
      ConfigError: a field of another type or out of range (see `settings.check_fields`).
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    act: str = "gelu_pytorch_tanh"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self, {**settings.IMAGE_TOWER, "act": Choice(TOWER_ACTIVATIONS)})

    @property
    def tokens(self) -> int:
        """Number of patches; pixels that do not fill a patch are dropped."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> SiglipVisionConfig:
        """Reads Hugging Face's `vision_config`, or the `config.json` of a tower alone.

        Keys that are left out take the defaults of `transformers.SiglipVisionConfig`.

        Raises:
          ConfigError: a tower without the attention pooling, or a setting of another type or out
            of range.
        """
        tower = Settings(config, HF_FILE)
        tower.get("num_channels", Choice((3,)), 3)
        if not tower.get("vision_use_head", settings.FLAG, True):
            raise ConfigError(
                "SigLIP: expected an image tower with its attention pooling, found "
                "vision_use_head false; such towers are not supported."
            )
        return cls(
            image_size=tower.get("image_size", settings.IMAGE_SIZE, 224),
            patch_size=tower.get("patch_size", settings.IMAGE_SIZE, 16),
            **read_hf_tower(tower, _HF_DEFAULTS),
        )

    def to_hf(self) -> dict[str, Any]:
        """The inverse of `from_hf`."""
        return write_hf_tower(self) | {
            "model_type": "siglip_vision_model",
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "num_channels": 3,
        }

    @classmethod
    def from_timm(cls, model: timm.TimmModel) -> SiglipVisionConfig:
        """Reads a named model of timm.

        Raises:
          ConfigError: no SigLIP that is supported.
        """
        named = _named(model.architecture)
        act = timm.activation(model, _timm_act(model.architecture))
        return cls(**timm.sizes(model, named), act=act)

    def to_timm(self, architecture: str | None = None) -> dict[str, Any]:
        """timm's `config.json`, as a variation of a named model (None chooses it).

        Raises:
          ConfigError: an epsilon that timm's towers do not have.
        """
        ours = dataclasses.asdict(self)
        act, eps = ours.pop("act"), ours.pop("eps")
        if eps != 1e-6:
            raise ConfigError(f"timm's SigLIP towers have eps 1e-6, found {eps}.")
        if architecture is None:
            fitting = (name for name in _EXACT + _TANH if _named(name).fields() == ours)
            architecture = next(fitting, _EXACT[0])
        extra = {} if act == _timm_act(architecture) else timm.act_layer(act)
        named = _named(architecture)
        return timm.write(architecture, ours, named, classes=0, pool="map", extra=extra)


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
        """Reads the `config.json` of a Hugging Face SigLIP folder.

        Raises:
          ConfigError: a tower is missing, or the text projection changes the width.
        """
        model = Settings(config, HF_FILE)
        image, text = (_hf_tower(model, f"{name}_config") for name in ("vision", "text"))
        vision = SiglipVisionConfig.from_hf(image.content)
        projected = text.get("projection_size", settings.Optional(settings.WIDTH), None)
        if projected not in (None, vision.width):
            raise ConfigError(
                f"SigLIP: expected text projection_size {vision.width}, the image tower's width, "
                f"found {projected}."
            )
        return cls(
            vision=vision,
            text=TextConfig(
                vocab_size=text.get("vocab_size", settings.VOCABULARY, 32000),
                context=text.get("max_position_embeddings", settings.CONTEXT, 64),
                pool="last",
                projection_bias=True,
                **read_hf_tower(text, _HF_DEFAULTS),
            ),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `transformers.SiglipModel` loads."""
        text = write_hf_tower(self.text) | {
            "model_type": "siglip_text_model",
            "vocab_size": self.text.vocab_size,
            "max_position_embeddings": self.text.context,
            "projection_size": self.embed_dim,
        }
        return {
            "architectures": ["SiglipModel"],
            "model_type": "siglip",
            "vision_config": self.vision.to_hf(),
            "text_config": text,
        }

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> SiglipConfig:
        """Reads the `model_cfg` of open_clip; the trunk's sizes follow from its timm name.

        Keys of `timm_overrides` (as in `timm.create_model`) replace them.

        Raises:
          ConfigError: another trunk or text tower.
        """
        model = open_clip.model_settings(config)
        vision, text = model.section("vision_cfg"), model.section("text_cfg")
        open_clip.check(vision, ("image_size", *TIMM_KEYS))
        open_clip.check(text, _TEXT_KEYS)
        vision.get("timm_pool", Choice(("map",)))
        vision.get("timm_proj", Choice(("none",)))
        for key, expected in (("no_causal_mask", True), ("proj_bias", True), ("pool_type", "last")):
            text.get(key, Choice((expected,)))
        activation = text.section("act_kwargs", optional=True)
        activation.refuse_others(("approximate",))
        tanh = activation.get("approximate", Choice(("none", "tanh")), "none") == "tanh"
        width = text.get("width", settings.WIDTH)
        return cls(
            vision=SiglipVisionConfig.from_timm(open_clip.timm_trunk(config)),
            text=TextConfig(
                vocab_size=text.get("vocab_size", settings.VOCABULARY),
                context=text.get("context_length", settings.CONTEXT),
                width=width,
                depth=text.get("layers", settings.DEPTH),
                heads=text.get("heads", settings.HEADS),
                mlp_dim=int(width * text.get("mlp_ratio", settings.RATIO, 4.0)),
                act="gelu_pytorch_tanh" if tanh else "gelu",
                eps=open_clip.eps(text),
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
        trunk = self.vision.to_timm()
        if text.act not in ("gelu", "gelu_pytorch_tanh"):
            raise ConfigError(f"SigLIP in open_clip: expected GELU in texts, found {text.act!r}.")
        if "model_args" in trunk:
            raise ConfigError(
                f"open_clip takes sizes and activation of {trunk['architecture']!r} from timm; "
                f"this tower differs in {trunk['model_args']}. Export in the 'hf' layout; where "
                "only the activation differs (timm runs most SigLIPs with the exact GELU), setting "
                "`act` of both towers to 'gelu' accepts a change of about 1e-3."
            )
        return {
            "embed_dim": self.embed_dim,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {
                "image_size": vision.image_size,
                "timm_model_name": trunk["architecture"],
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "text_cfg": {
                **open_clip.write_text(text),
                "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
                "tokenizer_kwargs": {"clean": "canonicalize"},
                "no_causal_mask": True,
                "proj_bias": True,
                "pool_type": "last",
                **({"act_kwargs": {"approximate": "tanh"}} if text.act != "gelu" else {}),
            },
        }


_TEXT_KEYS = (
    *("context_length", "vocab_size", "heads"),
    *("no_causal_mask", "proj_bias", "pool_type", "act_kwargs"),
)
_NAME = re.compile(r"vit_([a-z0-9]+)_patch(\d+)_siglip_(\d+)")
_TIMM_SIZES = {
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "giantopt": (1536, 40, 16, 4.0),
}
"""Width, depth, heads, MLP ratio."""
_EXACT = (
    *(f"vit_base_patch16_siglip_{side}" for side in (224, 256, 384, 512)),
    *(f"vit_large_patch16_siglip_{side}" for side in (256, 384)),
    *(f"vit_so400m_patch14_siglip_{side}" for side in (224, 378, 384)),
)
"""timm's names for trunks with attention pooling that it runs with the exact GELU."""
_TANH = (
    *("vit_base_patch32_siglip_256", "vit_large_patch16_siglip_512"),
    *(f"vit_so400m_patch16_siglip_{side}" for side in (256, 384, 512)),
    *(f"vit_giantopt_patch16_siglip_{side}" for side in (256, 384)),
)
"""Those that came with SigLIP 2, which it runs with the tanh form."""


def is_siglip(architecture: str) -> bool:
    """Whether timm's name is one of a SigLIP image tower with attention pooling."""
    return bool(_NAME.fullmatch(architecture))


def _named(architecture: str) -> timm.Size:
    match = _NAME.fullmatch(architecture)
    if match is None or match[1] not in _TIMM_SIZES:
        raise ConfigError(
            f"SigLIP: expected a timm trunk such as {_EXACT[0]}, of the size "
            f"{', '.join(_TIMM_SIZES)}; found {architecture!r}."
        )
    return timm.Size(int(match[3]), int(match[2]), *_TIMM_SIZES[match[1]])


def _timm_act(architecture: str) -> str:
    return "gelu_pytorch_tanh" if architecture in _TANH else "gelu"


_HF_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def _hf_tower(model: Settings, name: str) -> Settings:
    """The settings of one tower. `transformers` ignores a `text_config_dict` of SigLIP, other than
    that of CLIP."""
    if name not in model:
        raise ConfigError(
            f"config.json has no {name!r}; expected a Hugging Face SigLIP configuration, found "
            f"the keys {shown(sorted(model.content))}"
        )
    tower = model.section(name, optional=True)
    old = model.section(f"{name}_dict", optional=True).content
    other = {key for key, value in old.items() if tower.content.get(key) != value}
    if other:
        raise ConfigError(
            f"config.json: expected {name}_dict to repeat {name}, found other values of "
            f"{', '.join(sorted(other))}. Keep the right ones, in {name}."
        )
    return tower


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
