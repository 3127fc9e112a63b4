"""Better eyes for multimodal models, in JAX. The table of contents; everything loads lazily.

import perception_jax
clip = perception_jax.load("scenes-clip")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from perception_jax.version import __version__

if TYPE_CHECKING:
    from perception_jax.api import Loaded, Processor, export, load

_MODULES = ("data", "evals", "interop", "models", "nn", "ops", "shard", "systems", "train", "viz")
_NAMES = {
    "load": "perception_jax.api",
    "export": "perception_jax.api",
    "Loaded": "perception_jax.api",
    "Processor": "perception_jax.api",
    "PerceptionError": "perception_jax.errors",
}

__all__ = ["Loaded", "PerceptionError", "Processor", "__version__", "export", "load", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"perception_jax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'perception_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
