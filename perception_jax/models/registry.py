"""Which architectures there are, and what the front door needs to know of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.interop.rules import RuleTable
from perception_jax.models.shardings import SHARDINGS
from perception_jax.ops.image import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture with its checkpoint layouts.

    Attributes:
      name: as in the `model_type` of a Hugging Face `config.json`.
      build: makes the model from its configuration and `nnx.Rngs`.
      read_config: by layout ("hf", "reference"): a parsed JSON to our configuration.
      write_config: by layout: our configuration to JSON.
      tables: by layout: configuration to name rules.
      shardings: `(path regex, PartitionSpec)` rows for a mesh.
      image_size: side of the square images that a configuration expects, pixels.
      context: length of the texts that a configuration expects, tokens; 0 without a text tower.
      mean, std: of the pixels, where a checkpoint does not say.
    """

    name: str
    build: Callable[..., nnx.Module]
    read_config: Mapping[str, Callable[[Mapping[str, Any]], Any]]
    write_config: Mapping[str, Callable[[Any], dict[str, Any]]]
    tables: Mapping[str, Callable[[Any], RuleTable]]
    shardings: tuple[tuple[str, Any], ...]
    image_size: Callable[[Any], int]
    context: Callable[[Any], int]
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


def _clip() -> Architecture:
    from perception_jax.models.clip.config import ClipConfig
    from perception_jax.models.clip.modeling import Clip
    from perception_jax.models.clip.params import TABLES

    return Architecture(
        name="clip",
        build=Clip,
        read_config={"hf": ClipConfig.from_hf, "reference": ClipConfig.from_open_clip},
        write_config={"hf": ClipConfig.to_hf, "reference": ClipConfig.to_open_clip},
        tables=TABLES,
        shardings=SHARDINGS,
        image_size=lambda config: config.vision.image_size,
        context=lambda config: config.text.context,
    )


def _siglip() -> Architecture:
    from perception_jax.models.siglip.config import SiglipConfig
    from perception_jax.models.siglip.modeling import Siglip
    from perception_jax.models.siglip.params import TABLES

    return Architecture(
        name="siglip",
        build=Siglip,
        read_config={"hf": SiglipConfig.from_hf, "reference": SiglipConfig.from_open_clip},
        write_config={"hf": SiglipConfig.to_hf, "reference": SiglipConfig.to_open_clip},
        tables=TABLES,
        shardings=SHARDINGS,
        image_size=lambda config: config.vision.image_size,
        context=lambda config: config.text.context,
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
        read_config={"reference": EvaConfig.from_open_clip},
        write_config={"reference": EvaConfig.to_open_clip},
        tables=TABLES,
        shardings=SHARDINGS,
        image_size=lambda config: config.vision.image_size,
        context=lambda config: config.text.context,
    )


def _dinov2() -> Architecture:
    from perception_jax.models.dinov2.config import Dinov2Config
    from perception_jax.models.dinov2.modeling import Dinov2
    from perception_jax.models.dinov2.params import TABLES

    return Architecture(
        name="dinov2",
        build=Dinov2,
        read_config={"hf": Dinov2Config.from_hf},
        write_config={"hf": Dinov2Config.to_hf},
        tables=TABLES,
        shardings=SHARDINGS,
        image_size=lambda config: 224,  # the published evaluation size, not the stored grid's
        context=lambda config: 0,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


_ARCHITECTURES = {"clip": _clip, "siglip": _siglip, "eva": _eva, "dinov2": _dinov2}
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
        found = make()
        if type(config).__module__.startswith(f"perception_jax.models.{found.name}."):
            return found
    raise ConfigError(f"expected the configuration of a model of ours, found {type(config)}.")
