"""Which architectures there are, and what the front door needs to know of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.interop.rules import RuleTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture with its checkpoint layouts.

    Attributes:
      name: as in the `model_type` of a Hugging Face `config.json`.
      build: makes the model from its configuration and `nnx.Rngs`.
      read_config: by layout ("hf", "reference"): a parsed JSON to our configuration.
      write_config: by layout: our configuration to JSON.
      tables: by layout: the name rules.
      shardings: `(path regex, PartitionSpec)` rows for a mesh.
      image_size: side of the square images that a configuration expects, pixels.
      context: length of the texts that a configuration expects, tokens.
    """

    name: str
    build: Callable[..., nnx.Module]
    read_config: Mapping[str, Callable[[Mapping[str, Any]], Any]]
    write_config: Mapping[str, Callable[[Any], dict[str, Any]]]
    tables: Mapping[str, Callable[[], RuleTable]]
    shardings: tuple[tuple[str, Any], ...]
    image_size: Callable[[Any], int]
    context: Callable[[Any], int]


def _clip() -> Architecture:
    from perception_jax.models.clip.config import ClipConfig
    from perception_jax.models.clip.modeling import Clip
    from perception_jax.models.clip.params import TABLES
    from perception_jax.models.clip.shardings import SHARDINGS

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


_ARCHITECTURES = {"clip": _clip}


def architecture(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
      ConfigError: there is none; the message lists those that there are.
    """
    if name not in _ARCHITECTURES:
        raise ConfigError(
            f"no architecture is called {name!r} here; there are: {', '.join(_ARCHITECTURES)}. "
            "The support matrix in README.md says what is planned."
        )
    return _ARCHITECTURES[name]()


def architecture_of(config: Any) -> Architecture:
    """The architecture that a configuration object belongs to."""
    for make in _ARCHITECTURES.values():
        found = make()
        if type(config).__module__.startswith(f"perception_jax.models.{found.name}."):
            return found
    raise ConfigError(f"expected the configuration of a model of ours, found {type(config)}.")
