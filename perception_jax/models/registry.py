"""Which architectures there are, and what the front door needs to know of each.

`models.identify` finds the one that a checkpoint belongs to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.interop.rules import RuleTable
from perception_jax.models import towers
from perception_jax.models.shardings import SHARDINGS
from perception_jax.models.towers import TowerConfig
from perception_jax.ops.image import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture with its checkpoint layouts.

    Attributes:
      name: as in the `model_type` of a Hugging Face `config.json`.
      build: makes the model from its configuration and `nnx.Rngs`.
      config: the type of its configurations; for a tower alone, of the `vision` in them.
      read_config: by layout ("hf", "reference", "timm", "jax"): a parsed JSON to our
        configuration. Without "jax" our own layout keeps the settings of "hf".
      write_config: by layout: our configuration to JSON, None where the layout has no settings.
      tables: by layout: configuration to name rules.
      shardings: `(path regex, PartitionSpec)` rows for a mesh.
      image_size: side of the square images that a configuration expects, pixels.
      context: length of the texts that a configuration expects, tokens; 0 without a text tower.
      tokenizer: the kind of its vocabulary; None without a text tower.
      tower: name of the architecture that is this one's image tower alone.
      mean, std: of the pixels, where a checkpoint does not say.
      resize: what the shortest side is resized to before the crop, where a checkpoint does not say;
        None for the image size.
    """

    name: str
    build: Callable[..., nnx.Module]
    config: type
    read_config: Mapping[str, Callable[[Mapping[str, Any]], Any]]
    write_config: Mapping[str, Callable[[Any], dict[str, Any] | None]]
    tables: Mapping[str, Callable[[Any], RuleTable]]
    image_size: Callable[[Any], int]
    context: Callable[[Any], int] = lambda _: 0
    tokenizer: Literal["clip", "siglip"] | None = None
    tower: str | None = None
    shardings: tuple[tuple[str, Any], ...] = SHARDINGS
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize: int | None = None

    @property
    def is_tower(self) -> bool:
        """Whether this is the image tower of another architecture, alone."""
        return self.name in _TOWERS

    def owns(self, config: Any) -> bool:
        """Whether a configuration is one of this architecture's."""
        if isinstance(config, TowerConfig):
            return self.is_tower and isinstance(config.vision, self.config)
        return isinstance(config, self.config)

    def settings_layout(self, layout: str) -> str:
        """The layout whose settings a layout uses: our own may borrow those of Hugging Face."""
        return "hf" if layout == "jax" and "jax" not in self.read_config else layout


def _clip() -> Architecture:
    from perception_jax.models.clip.config import ClipConfig
    from perception_jax.models.clip.modeling import Clip
    from perception_jax.models.clip.params import TABLES

    return Architecture(
        name="clip",
        build=Clip,
        config=ClipConfig,
        read_config={"hf": ClipConfig.from_hf, "reference": ClipConfig.from_open_clip},
        write_config={"hf": ClipConfig.to_hf, "reference": ClipConfig.to_open_clip},
        tables=TABLES,
        image_size=lambda config: config.vision.image_size,
        context=lambda config: config.text.context,
        tokenizer="clip",
        tower="clip_vision_model",
    )


def _clip_vision() -> Architecture:
    from perception_jax.models.clip import timm
    from perception_jax.models.clip.config import VisionConfig
    from perception_jax.models.clip.modeling import VisionTower
    from perception_jax.models.clip.params import TOWER_TABLES

    def to_hf(config: TowerConfig) -> dict[str, Any]:
        kind = "CLIPVisionModel" if config.embed_dim is None else "CLIPVisionModelWithProjection"
        width = {} if config.embed_dim is None else {"projection_dim": config.embed_dim}
        return {"architectures": [kind], **config.vision.to_hf(), **width}

    return Architecture(
        name="clip_vision_model",
        build=functools.partial(towers.build, VisionTower),
        config=VisionConfig,
        read_config={
            "hf": lambda s: TowerConfig(vision=VisionConfig.from_hf(s.get("vision_config", s))),
            "reference": lambda s: TowerConfig(vision=VisionConfig.from_open_clip(s)),
            "timm": lambda s: TowerConfig(vision=timm.read(s)),
        },
        write_config={
            "hf": to_hf,
            "timm": lambda config: timm.write(config.vision, config.embed_dim),
        },
        tables=TOWER_TABLES,
        image_size=lambda config: config.vision.image_size,
    )


def _siglip() -> Architecture:
    from perception_jax.models.siglip.config import SiglipConfig
    from perception_jax.models.siglip.modeling import Siglip
    from perception_jax.models.siglip.params import TABLES

    return Architecture(
        name="siglip",
        build=Siglip,
        config=SiglipConfig,
        read_config={"hf": SiglipConfig.from_hf, "reference": SiglipConfig.from_open_clip},
        write_config={"hf": SiglipConfig.to_hf, "reference": SiglipConfig.to_open_clip},
        tables=TABLES,
        image_size=lambda config: config.vision.image_size,
        context=lambda config: config.text.context,
        tokenizer="siglip",
        tower="siglip_vision_model",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def _siglip_vision() -> Architecture:
    from perception_jax.models import timm
    from perception_jax.models.siglip.config import SiglipConfig, SiglipVisionConfig
    from perception_jax.models.siglip.modeling import VisionTower
    from perception_jax.models.siglip.params import TOWER_TABLES

    def to_hf(config: TowerConfig) -> dict[str, Any]:
        return {"architectures": ["SiglipVisionModel"], **config.vision.to_hf()}

    return Architecture(
        name="siglip_vision_model",
        build=lambda config, *, rngs: VisionTower(config.vision, rngs=rngs),
        config=SiglipVisionConfig,
        read_config={
            "hf": lambda s: TowerConfig(
                vision=SiglipVisionConfig.from_hf(s.get("vision_config", s))
            ),
            "reference": lambda s: TowerConfig(vision=SiglipConfig.from_open_clip(s).vision),
            "timm": lambda s: TowerConfig(vision=SiglipVisionConfig.from_timm(timm.read(s))),
        },
        write_config={"hf": to_hf, "timm": lambda config: config.vision.to_timm()},
        tables=TOWER_TABLES,
        image_size=lambda config: config.vision.image_size,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def _eva() -> Architecture:
    from perception_jax.models.eva.config import EvaConfig
    from perception_jax.models.eva.modeling import Eva
    from perception_jax.models.eva.params import TABLES

    return Architecture(
        name="eva",
        build=Eva,
        config=EvaConfig,
        read_config={"reference": EvaConfig.from_open_clip, "jax": EvaConfig.from_open_clip},
        write_config={"reference": EvaConfig.to_open_clip, "jax": EvaConfig.to_jax},
        tables=TABLES,
        image_size=lambda config: config.vision.image_size,
        context=lambda config: config.text.context,
        tokenizer="clip",
        tower="eva_vision_model",
    )


def _eva_vision() -> Architecture:
    from perception_jax.models import timm
    from perception_jax.models.eva.config import EvaConfig, EvaVisionConfig
    from perception_jax.models.eva.modeling import VisionTower
    from perception_jax.models.eva.params import TOWER_TABLES

    def read(settings: Mapping[str, Any]) -> TowerConfig:
        if "architecture" in settings:
            return TowerConfig(vision=EvaVisionConfig.from_timm(timm.read(settings)))
        return TowerConfig(vision=EvaConfig.from_open_clip(settings).vision)

    def write(config: TowerConfig) -> dict[str, Any]:
        return config.vision.to_timm(None, config.embed_dim)

    return Architecture(
        name="eva_vision_model",
        build=functools.partial(towers.build, VisionTower),
        config=EvaVisionConfig,
        read_config={
            "reference": read,
            "timm": read,
            "jax": read,
        },
        write_config={"timm": write, "jax": write},
        tables=TOWER_TABLES,
        image_size=lambda config: config.vision.image_size,
    )


def _dinov2() -> Architecture:
    from perception_jax.models.dinov2 import names
    from perception_jax.models.dinov2.config import Dinov2Config
    from perception_jax.models.dinov2.modeling import Dinov2
    from perception_jax.models.dinov2.params import TABLES

    return Architecture(
        name="dinov2",
        build=Dinov2,
        config=Dinov2Config,
        read_config={
            "hf": Dinov2Config.from_hf,
            "timm": names.from_timm,
            "jax": Dinov2Config.from_jax,
        },
        write_config={
            "hf": Dinov2Config.to_hf,
            "reference": names.check_reference,
            "timm": names.to_timm,
            "jax": Dinov2Config.to_jax,
        },
        tables=TABLES,
        image_size=lambda config: 224,  # the published evaluation size, not the stored grid's
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        resize=256,
    )


_TOWERS = {
    "clip_vision_model": _clip_vision,
    "siglip_vision_model": _siglip_vision,
    "eva_vision_model": _eva_vision,
}
_ARCHITECTURES = {"clip": _clip, "siglip": _siglip, "eva": _eva, "dinov2": _dinov2, **_TOWERS}
_ALIASES = {"dinov2_with_registers": "dinov2"}


def architecture(name: str) -> Architecture:
    """The architecture of that name (the `model_type` of a Hugging Face `config.json`).

    Raises:
      ConfigError: there is none; the message lists those that there are.
    """
    name = _ALIASES.get(name, name)
    if name not in _ARCHITECTURES:
        raise ConfigError(
            f"no architecture is called {name!r} here; there are: {', '.join(_ARCHITECTURES)}. "
            "The support matrix in README.md says what is planned."
        )
    return _ARCHITECTURES[name]()


def open_clip_architecture(settings: Mapping[str, Any]) -> Architecture:
    """The architecture that an open_clip configuration describes, by its image trunk."""
    vision = settings.get("model_cfg", settings).get("vision_cfg", {})
    trunk = str(vision.get("timm_model_name", ""))
    if "siglip" in trunk:
        return _siglip()
    return _eva() if trunk.startswith("eva") else _clip()


def architecture_of(config: Any) -> Architecture:
    """The architecture that a configuration object belongs to."""
    for make in _ARCHITECTURES.values():
        if (found := make()).owns(config):
            return found
    raise ConfigError(f"expected the configuration of a model of ours, found {type(config)}.")
