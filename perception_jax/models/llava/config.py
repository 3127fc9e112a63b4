"""Configurations of LLaVA with one image tower, or two (arXiv 2401.06209, §4): published sizes."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.towers import TowerConfig
from perception_jax.settings import Choice, Integer, Number, Optional

MIXINGS = ("single", "additive", "interleaved")
"""How the features of image towers are combined."""
LAYER = Integer(-1024, 1024)
"""Setting type of `LlavaConfig.select_layer`."""
FEATURES = Choice(("patch", "cls_patch"))
"""Setting type of `LlavaConfig.select_feature`."""
ASPECT = Optional(Choice(("pad", "square")))
"""Setting type of `LlavaConfig.image_aspect`."""
TOKEN = Optional(Integer(0, 2**31 - 1))
"""Setting type of `LlavaConfig.image_id`."""

_MLP = re.compile(r"mlp([1-9]\d?)x_gelu")
_KINDS = {
    "mixing": Choice(MIXINGS),
    "mixing_ratio": Number(low=0.0, high=1.0),
    "projector": settings.TEXT,
    "select_layer": LAYER,
    "select_feature": FEATURES,
    "image_aspect": ASPECT,
    "image_id": TOKEN,
    "image_marks": settings.FLAG,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig:
    """Configuration of a language model that reads images through one or two image towers.

    Attributes:
      language: of the language model.
      towers: one image tower, or two of equal grids: a `TowerConfig` without projection to a joint
        space, or a `Dinov2Config`. The first decides the size of images and how they are
        normalised; the second gets the same pixels.
      mixing: "single"; "additive": the weighted sum of the features of both towers, and one
        projector; "interleaved": a projector for each tower, and their tokens in turn, the first
        tower's first.
      mixing_ratio: weight of the first tower in the sum; the other's is the rest.
      projector: "linear", "mlp2x_gelu" (any number of layers) or "identity".
      select_layer: hidden state of the first tower that is read, 0 before its blocks; negative
        counts from the end. Of the second it is always the last one. None has a final norm.
      select_feature: "patch", or "cls_patch" with the class token (and registers) in front.
      image_aspect: "pad" fills images up to squares, otherwise their centre is cut out.
      image_id: placeholder of an image in the tokenizer of llava-hf; None in the authors' code,
        which has no token for it.
      image_marks: whether prompts have `<im_start>` and `<im_end>` around an image.

    Raises:
      ConfigError: a field of another type or out of range, or towers that cannot be mixed.
    """

    language: LlamaConfig
    towers: tuple[Any, ...]
    mixing: Literal["single", "additive", "interleaved"] = "single"
    mixing_ratio: float = 0.5
    projector: str = "mlp2x_gelu"
    select_layer: int = -2
    select_feature: Literal["patch", "cls_patch"] = "patch"
    image_aspect: Literal["pad", "square"] | None = None
    image_id: int | None = None
    image_marks: bool = False

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            settings.check(getattr(self, name), kind, f"LlavaConfig.{name}")
        _ = self.projector_depth  # raises for an unknown projector
        self._check_towers()
        self._check_widths()
        depth = tower_vision(self.towers[0]).depth
        if not 0 <= self.layers[0] <= depth:
            raise ConfigError(
                f"LlavaConfig.select_layer: the first tower has {depth} blocks, found the hidden "
                f"state {self.select_layer}."
            )

    @property
    def image_size(self) -> int:
        """Side of images, pixels."""
        return tower_vision(self.towers[0]).image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        side = self.image_size // tower_vision(self.towers[0]).patch_size
        return side, side

    @property
    def prefix(self) -> int:
        """Tokens of each tower before those of its patches that the language model gets."""
        return 0 if self.select_feature == "patch" else _prefix(self.towers[0])

    @property
    def tokens_per_image(self) -> int:
        """Tokens of an image in a text."""
        one = self.grid[0] * self.grid[1] + self.prefix
        return 2 * one if self.mixing == "interleaved" else one

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden state of each tower that is read, which is how many of its blocks run."""
        depths = [tower_vision(tower).depth for tower in self.towers]
        first = self.select_layer + (depths[0] + 1 if self.select_layer < 0 else 0)
        return (first, *depths[1:])

    @property
    def projector_depth(self) -> int:
        """Linear layers of a projector; 0 for "identity".

        Raises:
          ConfigError: an unknown projector.
        """
        if self.projector in ("identity", "linear"):
            return int(self.projector == "linear")
        if (match := _MLP.fullmatch(self.projector)) is None:
            raise ConfigError(
                "LlavaConfig.projector: expected 'linear', 'identity' or a name such as "
                f"'mlp2x_gelu', found {settings.shown(self.projector)}."
            )
        return int(match[1])

    @classmethod
    def llava_7b(cls, image_size: int = 224) -> LlavaConfig:
        """LLaVA 7B with Vicuna 1.3; 224 or 336 pixels."""
        return cls(
            language=LlamaConfig.vicuna_7b("1.3"),
            towers=(clip_l14(image_size),),
            projector="linear",
        )

    @classmethod
    def llava_13b(cls, image_size: int = 224) -> LlavaConfig:
        """LLaVA 13B with Vicuna 1.3; 224 or 336 pixels."""
        return dataclasses.replace(cls.llava_7b(image_size), language=LlamaConfig.vicuna_13b("1.3"))

    @classmethod
    def llava15_7b(cls) -> LlavaConfig:
        """LLaVA-1.5 7B, in the authors' vocabulary."""
        return cls(
            language=LlamaConfig.vicuna_7b("1.5"), towers=(clip_l14(336),), image_aspect="pad"
        )

    @classmethod
    def llava15_13b(cls) -> LlavaConfig:
        """LLaVA-1.5 13B, in the authors' vocabulary."""
        return dataclasses.replace(cls.llava15_7b(), language=LlamaConfig.vicuna_13b("1.5"))

    @classmethod
    def imof_13b(cls, image_size: int = 336) -> LlavaConfig:
        """LLaVA-1.5 13B with interleaved features of CLIP and DINOv2; 224 or 336 pixels."""
        return dataclasses.replace(
            cls.llava15_13b(), towers=(clip_l14(image_size), dinov2_l14()), mixing="interleaved"
        )

    def with_image_token(self, vocab_size: int = 32064) -> LlavaConfig:
        """Returns the configuration of llava-hf's copy of the model: the first new id stands for an
        image, the next one pads, and all images are cut.

        Args:
          vocab_size: rows of its embedding table.
        """
        first = self.language.vocab_size
        language = dataclasses.replace(self.language, vocab_size=vocab_size, pad_id=first + 1)
        return dataclasses.replace(self, language=language, image_id=first, image_aspect=None)

    def _check_towers(self) -> None:
        wanted = 1 if self.mixing == "single" else 2
        if len(self.towers) != wanted:
            raise ConfigError(
                f"LlavaConfig: mixing {self.mixing!r} takes {wanted} image tower(s), found "
                f"{len(self.towers)}."
            )
        for tower in self.towers:
            if not isinstance(tower, TowerConfig | Dinov2Config):
                raise ConfigError(
                    "LlavaConfig.towers: expected a TowerConfig or a Dinov2Config, found "
                    f"{type(tower).__name__}."
                )
            if isinstance(tower, TowerConfig) and tower.embed_dim is not None:
                raise ConfigError(
                    "LlavaConfig.towers: expected towers without a projection to a joint space "
                    f"(embed_dim None), found one of width {tower.embed_dim}."
                )
        grids = [self.image_size // tower_vision(tower).patch_size for tower in self.towers]
        before = [_prefix(tower) for tower in self.towers]
        if len(set(grids)) > 1:
            described = " and ".join(
                f"{side}×{side} (patches of {tower_vision(tower).patch_size} pixels)"
                for side, tower in zip(grids, self.towers, strict=True)
            )
            raise ConfigError(
                f"LlavaConfig: towers can be mixed at equal grids alone; at {self.image_size} "
                f"pixels they are {described}. Choose towers of one patch size."
            )
        if self.select_feature == "cls_patch" and len(set(before)) > 1:
            raise ConfigError(
                "LlavaConfig: with select_feature 'cls_patch' both towers need as many tokens "
                f"before the patches, found {before}. Take 'patch'."
            )

    def _check_widths(self) -> None:
        widths = {tower_vision(tower).width for tower in self.towers}
        if self.mixing == "additive" and len(widths) > 1:
            raise ConfigError(
                f"LlavaConfig: features of one width can be added, found {sorted(widths)}. Take "
                "'interleaved', which has a projector for each tower."
            )
        if self.projector == "identity" and widths != {self.language.width}:
            raise ConfigError(
                f"LlavaConfig: without projector the towers need the width of the language model, "
                f"{self.language.width}, found {sorted(widths)}."
            )


def tower_vision(tower: TowerConfig | Dinov2Config) -> Any:
    """The sizes of an image tower: `image_size`, `patch_size`, `width`, `depth` and others."""
    return tower.vision if isinstance(tower, TowerConfig) else tower


def clip_l14(image_size: int) -> TowerConfig:
    """OpenAI's CLIP ViT-L/14 without projection, at 224 or 336 pixels.

    Raises:
      ConfigError: another size.
    """
    found = {224: ClipConfig.vit_l14, 336: ClipConfig.vit_l14_336}.get(image_size)
    if found is None:
        raise ConfigError(
            f"CLIP ViT-L/14: expected images of 224 or 336 pixels, found {image_size}."
        )
    return TowerConfig(vision=found().vision)


def dinov2_l14() -> Dinov2Config:
    """DINOv2 ViT-L/14 without registers, positions resized as in the authors' code."""
    return dataclasses.replace(Dinov2Config.large(), position_offset=0.1)


def _prefix(tower: TowerConfig | Dinov2Config) -> int:
    """Class token and registers of a tower."""
    vision = tower_vision(tower)
    if isinstance(vision, Dinov2Config):
        return 1 + vision.registers
    return vision.tokens - (vision.image_size // vision.patch_size) ** 2
