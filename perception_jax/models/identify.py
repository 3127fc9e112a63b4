"""Which model a checkpoint is, from its settings where it has some, and from its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from perception_jax.errors import ConfigError, PerceptionError
from perception_jax.interop.rules import RuleTable, identity_table
from perception_jax.models import towers
from perception_jax.models.registry import Architecture, architecture, open_clip_architecture

Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Identified:
    """Attributes:
    architecture: whose model it is.
    layout: whose names the tensors have.
    config: its frozen configuration.
    """

    architecture: Architecture
    layout: str
    config: Any


def identify(
    settings: Mapping[str, Any], layout: str | None, shapes: Shapes, *, part: bool = False
) -> Identified | None:
    """The model that settings and tensors describe; None if there are no settings and the tensors
    do not tell either.

    Args:
      settings: a parsed JSON; empty if there is none.
      layout: whose settings they are, "hf", "reference", "timm" or "jax"; None without any.
      shapes: of the checkpoint's tensors.
      part: the tensors are a part of what the settings describe, e.g. the image tower.

    Raises:
      ConfigError: a model that is not built here, or settings that make no sense.
    """
    if layout is None:
        return _by_names(shapes)
    # Every two-tower model has a temperature, so without one it can only be the image tower.
    tower = part and "logit_scale" not in shapes
    try:
        arch = _architecture(settings, layout, tower)
        config = _read(arch, layout)(settings)
    except PerceptionError:
        raise
    except Exception as error:  # whatever wrong types and missing keys lead to
        raise ConfigError(
            f"expected settings of a model in the layout {layout!r}, found some that cannot be "
            f"read: {error!r}. Is the JSON file whole, and of this model?"
        ) from error
    if arch.is_tower:
        table = identity_table(shapes) if layout == "jax" else arch.tables[layout](config)
        config = towers.with_projection(config, table, shapes)
    return Identified(arch, layout, config)


def _read(arch: Architecture, layout: str) -> Callable[[Mapping[str, Any]], Any]:
    read = arch.read_config.get(arch.settings_layout(layout))
    if read is None:
        raise ConfigError(
            f"{arch.name} has no configuration file in the layout {layout!r}; it has: "
            f"{', '.join(arch.read_config)}. Give another as `config`."
        )
    return read


def _architecture(settings: Mapping[str, Any], layout: str, tower: bool) -> Architecture:
    if layout == "timm":
        return _timm_architecture(str(settings["architecture"]).partition(".")[0])
    if layout == "reference":
        arch = open_clip_architecture(settings)
    else:
        name = settings.get("model_type", "clip")
        inner = settings.get("vision_config") or {}
        if tower and layout == "hf" and "model_type" in inner:
            name = inner["model_type"]  # of a LLaVA, or of a CLIP itself
        try:
            arch = architecture(name)
        except ConfigError as error:
            if "vision_config" not in settings:
                raise
            raise ConfigError(
                f"{error} To load the image tower alone, give the beginning of its tensors' names "
                'as `prefix`, e.g. "vision_tower.".'
            ) from error
    return architecture(arch.tower) if tower and arch.tower else arch


def _timm_architecture(name: str) -> Architecture:
    from perception_jax.models.clip.timm import is_clip
    from perception_jax.models.dinov2.names import is_dinov2
    from perception_jax.models.eva.config import is_eva
    from perception_jax.models.siglip.config import is_siglip

    kinds = {
        "clip_vision_model": is_clip,
        "siglip_vision_model": is_siglip,
        "eva_vision_model": is_eva,
        "dinov2": is_dinov2,
    }
    for kind, fits in kinds.items():
        if fits(name):
            return architecture(kind)
    raise ConfigError(
        f"timm's {name!r} is not built here; there are the image towers of CLIP, SigLIP (with "
        "attention pooling) and EVA-CLIP, and DINOv2, e.g. vit_large_patch14_clip_336, "
        "vit_so400m_patch14_siglip_384, eva02_large_patch14_clip_336, vit_base_patch14_dinov2."
    )


def _by_names(shapes: Shapes) -> Identified | None:
    """DINOv2's own files and OpenAI's archives have no settings and need none."""
    from perception_jax.models.clip.config import ClipConfig
    from perception_jax.models.dinov2 import names
    from perception_jax.models.dinov2.params import REFERENCE_RENAMES

    rename = RuleTable(rules=(), renames=REFERENCE_RENAMES).rename
    renamed = {rename(name): shape for name, shape in shapes.items()}
    if layout := names.layout_of(renamed):
        return Identified(architecture("dinov2"), layout, names.from_shapes(renamed, layout))
    if {"input_resolution", "context_length", "vocab_size", "visual.proj"} <= shapes.keys():
        return Identified(architecture("clip"), "reference", ClipConfig.from_openai(shapes))
    return None
