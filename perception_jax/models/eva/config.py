"""Configurations of EVA-CLIP: EVA01-g, EVA02-B, -L, -E and -E-plus, as open_clip builds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.models import open_clip, timm
from perception_jax.models.timm import Size
from perception_jax.nn.text_tower import TextConfig
from perception_jax.settings import Choice, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaVisionConfig:
    """Configuration of EVA-CLIP's image tower.

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

    def __post_init__(self) -> None:
        kinds = {"kind": Choice(tuple(_ALONE)), "reference_grid": _GRID}
        check_fields(self, {**settings.IMAGE_TOWER, **kinds})

    @property
    def tokens(self) -> int:
        """Number of tokens: class token and patches."""
        return 1 + (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_timm(cls, model: timm.TimmModel) -> EvaVisionConfig:
        """Reads a named model of timm.

        Raises:
          ConfigError: no EVA that is supported, or another activation.
        """
        kind, named = _named(model.architecture)
        if "act_layer" in model.args:
            raise ConfigError(f"EVA: expected no act_layer, found {model.args['act_layer']!r}.")
        return cls(kind=kind, **timm.sizes(model, named))

    def to_timm(self, architecture: str | None, embed_dim: int | None) -> dict[str, Any]:
        """timm's `config.json`, as a variation of a named model (None chooses it).

        Raises:
          ConfigError: another kind than that of the named model, or settings that timm fixes.
        """
        ours = dataclasses.asdict(self)
        fixed = {key: ours.pop(key) for key in ("kind", "eps", "reference_grid")}
        if architecture is None:
            names = _ALONE[self.kind]
            fitting = (name for name in names if _TRUNKS[name][1].fields() == ours)
            architecture = next(fitting, names[0])
        kind, named = _named(architecture)
        if fixed != {"kind": kind, "eps": 1e-6, "reference_grid": (16, 16)}:
            raise ConfigError(
                f"timm's {architecture} is of kind {kind!r} with eps 1e-6 and positions on a "
                f"16 × 16 grid; found {fixed}."
            )
        return timm.write(architecture, ours, named, classes=embed_dim or 0, pool="token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """Both towers and the width of the joint space; `trunk` is timm's name of the image tower."""

    vision: EvaVisionConfig
    text: TextConfig
    embed_dim: int
    trunk: str

    def __post_init__(self) -> None:
        check_fields(self, {"embed_dim": settings.WIDTH, "trunk": settings.TEXT})

    @classmethod
    def eva01_g14(cls) -> EvaConfig:
        """EVA01-g/14, 224 px."""
        return _published("eva_giant_patch14_224", embed=1024, text=(768, 12, 12))

    @classmethod
    def eva01_g14_plus(cls) -> EvaConfig:
        """EVA01-g/14-plus, 224 px."""
        return _published("eva_giant_patch14_224", embed=1024, text=(1024, 24, 16))

    @classmethod
    def eva02_b16(cls) -> EvaConfig:
        """EVA02-B/16, 224 px."""
        return _published("eva02_base_patch16_clip_224", embed=512, text=(512, 12, 8))

    @classmethod
    def eva02_l14(cls) -> EvaConfig:
        """EVA02-L/14, 224 px."""
        return _published("eva02_large_patch14_clip_224", embed=768, text=(768, 12, 12))

    @classmethod
    def eva02_l14_336(cls) -> EvaConfig:
        """EVA02-L/14, 336 px."""
        return _published("eva02_large_patch14_clip_336", embed=768, text=(768, 12, 12))

    @classmethod
    def eva02_e14(cls) -> EvaConfig:
        """EVA02-E/14, 224 px."""
        return _published("eva02_enormous_patch14_clip_224", embed=1024, text=(1024, 24, 16))

    @classmethod
    def eva02_e14_plus(cls) -> EvaConfig:
        """EVA02-E/14-plus, 224 px."""
        return _published("eva02_enormous_patch14_clip_224", embed=1024, text=(1280, 32, 20))

    @classmethod
    def from_open_clip(cls, config: Mapping[str, Any]) -> EvaConfig:
        """Reads the `model_cfg` of open_clip; the trunk's sizes follow from its timm name.

        Keys of `timm_overrides` (as in `timm.create_model`) replace them.

        Raises:
          ConfigError: a trunk that is no EVA that is supported, or another text tower.
        """
        model = open_clip.model_settings(config)
        vision = model.section("vision_cfg")
        open_clip.check(vision, ("image_size", *open_clip.TIMM_KEYS))
        vision.get("timm_pool", Choice(("token",)))
        vision.get("timm_proj", Choice((None,)))
        return cls(
            vision=EvaVisionConfig.from_timm(open_clip.timm_trunk(config, image_size=224)),
            text=open_clip.read_text(model.section("text_cfg"), act="gelu"),
            embed_dim=model.get("embed_dim", settings.WIDTH),
            trunk=vision.get("timm_model_name", settings.TEXT),
        )

    def to_open_clip(self) -> dict[str, Any]:
        """The `model_cfg` that open_clip builds this model from.

        Raises:
          ConfigError: sizes that differ from those of the named timm trunk.
        """
        settings = self.to_jax()
        if "timm_overrides" in settings:
            raise ConfigError(
                f"open_clip takes the sizes of {self.trunk!r} from timm; this tower has others: "
                f"{self.vision}, which its configuration file cannot express: export in the 'jax' "
                "layout."
            )
        return settings["model_cfg"]

    def to_jax(self) -> dict[str, Any]:
        """Open_clip's settings, with `timm_overrides` where the trunk differs from the named one.

        Raises:
          ConfigError: settings that timm's trunks do not have.
        """
        vision, text = self.vision, self.text
        changes = vision.to_timm(self.trunk, None).get("model_args")
        if text.act != "gelu":
            raise ConfigError(f"EVA: expected text act 'gelu', found {text.act!r}.")
        model = {
            "embed_dim": self.embed_dim,
            "custom_text": True,
            "vision_cfg": {
                "image_size": vision.image_size,
                "timm_model_name": self.trunk,
                "timm_model_pretrained": False,
                "timm_pool": "token",
                "timm_proj": None,
            },
            "text_cfg": open_clip.write_text(text),
        }
        return {"model_cfg": model} | ({"timm_overrides": changes} if changes else {})


_GRID = settings.Several(settings.IMAGE_SIZE, 2, 2)
_GIANT = ("eva01", Size(224, 14, 1408, 40, 16, 6144 / 1408))
_TRUNKS = {
    "eva_giant_patch14_224": _GIANT,
    "eva_giant_patch14_clip_224": _GIANT,
    "eva02_enormous_patch14_clip_224": (
        "eva02_post_norm",
        Size(224, 14, 1792, 64, 16, 15360 / 1792),
    ),
    "eva02_large_patch14_clip_224": ("eva02_rope", Size(224, 14, 1024, 24, 16, 4 * 2 / 3)),
    "eva02_large_patch14_clip_336": ("eva02_rope", Size(336, 14, 1024, 24, 16, 4 * 2 / 3)),
    "eva02_base_patch16_clip_224": ("eva02_rope", Size(224, 16, 768, 12, 12, 4 * 2 / 3)),
}
"""Kind and sizes by timm's name."""
_ALONE = {
    "eva01": ("eva_giant_patch14_clip_224",),
    "eva02_post_norm": ("eva02_enormous_patch14_clip_224",),
    "eva02_rope": (
        "eva02_large_patch14_clip_224",
        "eva02_large_patch14_clip_336",
        "eva02_base_patch16_clip_224",
    ),
}
"""timm's names for the tower alone by kind; the first is used for other sizes."""


def is_eva(architecture: str) -> bool:
    """Whether timm's name is one of a supported EVA image tower."""
    return architecture in _TRUNKS


def _named(architecture: str) -> tuple[str, Size]:
    if architecture not in _TRUNKS:
        raise ConfigError(
            f"EVA: expected a timm trunk among {', '.join(_TRUNKS)}; found {architecture!r}."
        )
    return _TRUNKS[architecture]


def _published(trunk: str, *, embed: int, text: tuple[int, int, int]) -> EvaConfig:
    width, depth, heads = text
    return EvaConfig(
        vision=EvaVisionConfig.from_timm(timm.read({"architecture": trunk})),
        text=TextConfig(width=width, depth=depth, heads=heads, mlp_dim=4 * width, act="gelu"),
        embed_dim=embed,
        trunk=trunk,
    )
