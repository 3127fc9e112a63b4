"""The list of architectures: modules that are imported on request.

`models.identify` finds the one that a checkpoint belongs to.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from perception_jax.errors import ConfigError
from perception_jax.models.architecture import Architecture
from perception_jax.settings import shown

MODULES = [
    "perception_jax.models.clip.architecture",
    "perception_jax.models.siglip.architecture",
    "perception_jax.models.eva.architecture",
    "perception_jax.models.dinov2.architecture",
    "perception_jax.models.llama.architecture",
    "perception_jax.models.llava.architecture",
]
"""Modules with a tuple `ARCHITECTURES`, in the order of lookup."""


def register(module: str) -> None:
    """Adds a module with a tuple `ARCHITECTURES`, so that `perception_jax.load` finds them."""
    if module not in MODULES:
        MODULES.append(module)


def architectures() -> Iterator[Architecture]:
    """Yields all architectures; their modules are imported one by one."""
    for module in MODULES:
        yield from importlib.import_module(module).ARCHITECTURES


def find(name: str) -> Architecture | None:
    """The architecture of that name or `model_type`; None if there is none."""
    fits = (item for item in architectures() if name == item.name or name in item.model_types)
    return next(fits, None)


def architecture(name: str) -> Architecture:
    """The architecture of that name (the `model_type` of a Hugging Face `config.json`).

    Raises:
      ConfigError: there is none; the message lists those that there are.
    """
    found = find(name)
    if found is None:
        raise ConfigError(
            f"no architecture is called {shown(name)} here; there are: "
            f"{', '.join(item.name for item in architectures())}. "
            "The support matrix in README.md says what is planned."
        )
    return found


def architecture_of(config: Any) -> Architecture:
    """The architecture that a configuration object belongs to.

    Raises:
      ConfigError: there is none.
    """
    for item in architectures():
        if item.owns(config):
            return item
    raise ConfigError(f"expected the configuration of a supported model, found {type(config)}.")
