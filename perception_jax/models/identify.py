"""Identifies the model of a checkpoint from its settings, if any, and its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax import nnx

from perception_jax.errors import ConfigError, PerceptionError
from perception_jax.interop.rules import matcher
from perception_jax.models import registry
from perception_jax.models.architecture import Architecture, Settings, Shapes
from perception_jax.models.params import flatten
from perception_jax.settings import shown

_MAX_PARTS = 64
"""Models that settings may describe inside one another; each is looked at."""
_ENOUGH = 0.5
"""Share of the names of a part that must be an architecture's, or the part is of another one."""


@dataclasses.dataclass(frozen=True)
class Identified:
    """An identified model: architecture, layout and configuration.

    Attributes:
      architecture: whose model it is.
      layout: whose names the tensors have.
      config: its frozen configuration.
    """

    architecture: Architecture
    layout: str
    config: Any


def identify(
    settings: Settings, layout: str | None, shapes: Shapes, *, part: bool = False
) -> Identified | None:
    """The model that settings and tensors describe; None if there are no settings and the tensors
    do not tell either.

    Args:
      settings: a parsed JSON; empty if there is none.
      layout: whose settings they are, "hf", "reference", "timm", "jax" or "gguf"; None without any.
      shapes: of the checkpoint's tensors.
      part: the tensors are a part of what the settings describe, e.g. the image tower. Which part
        follows from their names.

    Raises:
      ConfigError: a model that is not supported, or settings that make no sense.
    """
    if layout is None:
        return _by_names(shapes)
    if part:
        return _part(settings, layout, shapes)
    try:
        arch = _architecture(settings, layout)
    except ConfigError as error:
        if not any(key.endswith("_config") for key in settings):
            raise
        raise ConfigError(
            f"{error} To load a part alone, such as the image tower, give the beginning of its "
            'tensors\' names as `prefix`, e.g. "vision_tower.".'
        ) from error
    return _read(arch, settings, layout, shapes)


def open_clip_architecture(settings: Settings) -> Architecture:
    """The architecture that an open_clip configuration describes.

    Raises:
      ConfigError: no supported one.
    """
    return _claimed(settings, "reference")


def _architecture(settings: Settings, layout: str) -> Architecture:
    """The architecture of the whole model."""
    try:
        if layout not in ("hf", "jax"):
            return _claimed(settings, layout)
        name = settings.get("model_type", "clip")
        if not isinstance(name, str):
            raise TypeError(f"model_type is {shown(name)}")
        return registry.architecture(name)
    except PerceptionError:
        raise
    except Exception as error:
        raise _unreadable(layout, error) from error


def _claimed(settings: Settings, layout: str) -> Architecture:
    """The architecture of settings that name no `model_type`."""
    claims = [(a, a.claims[layout]) for a in registry.architectures() if layout in a.claims]
    for arch, claim in claims:
        if claim.fits(settings):
            return arch
    inner = settings.get("model_cfg", settings)
    named = [key for key in ("architecture", "general.architecture") if key in settings]
    found = settings[named[0]] if named else inner["vision_cfg"]
    raise ConfigError(
        f"{layout}: the model of {shown(found)} is not supported; supported are "
        f"{', '.join(f'{arch.name} ({claim.expects})' for arch, claim in claims)}."
    )


def _read(arch: Architecture, settings: Settings, layout: str, shapes: Shapes) -> Identified:
    """The configuration of a known architecture."""
    if layout == "hf" and arch.layout_of is not None:
        layout = arch.layout_of(settings, shapes)
    read = arch.read_config.get(arch.settings_layout(layout))
    if read is None:
        raise ConfigError(
            f"{arch.name} has no configuration file in the layout {layout!r}; it has: "
            f"{', '.join(arch.read_config)}. Give another as `config`."
        )
    try:
        config = read(settings)
    except PerceptionError:
        raise
    except Exception as error:  # whatever wrong types and missing keys lead to
        raise _unreadable(layout, error) from error
    if arch.complete is not None:
        config = arch.complete(config, arch.table(layout, config, shapes), shapes)
    return Identified(arch, layout, config)


def _unreadable(layout: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"expected settings of a model in the layout {layout!r}, found some that cannot be "
        f"read: {error!r:.200}. Is the JSON file whole, and of this model?"
    )


def _by_names(shapes: Shapes) -> Identified | None:
    """The model of tensors that need no settings, such as DINOv2's own files."""
    for arch in registry.architectures():
        found = arch.read_names(shapes) if arch.read_names else None
        if found is not None:
            return Identified(arch, *found)
    return None


def _part(settings: Settings, layout: str, shapes: Shapes) -> Identified:
    """The part of the model whose names the tensors have."""
    found: list[tuple[tuple[float, float], str, Identified]] = []
    problems: list[PerceptionError] = []
    for count, (where, part, arch) in enumerate(_parts(settings, layout)):
        if count == _MAX_PARTS:
            raise ConfigError(f"expected settings of at most {_MAX_PARTS} models, found more.")
        try:
            if isinstance(arch, PerceptionError):
                raise arch
            one = _read(arch, part, layout, shapes)
            found.append((_fit(one, shapes), where, one))
        except PerceptionError as error:
            problems.append(error)
    if not found:
        raise ConfigError(" ".join(map(str, problems)))
    fit, _, best = max(found, key=lambda item: item[0])
    if fit[0] >= _ENOUGH:
        return best
    if (by_names := _by_names(shapes)) is not None:
        return by_names
    compared = [f"{where}: {one.architecture.name}" for _, where, one in found]
    raise ConfigError(
        f"the {len(shapes)} tensors of the requested part (e.g. "
        f"{', '.join(list(shapes)[:3])}) are those of nothing that its settings describe and that "
        f"is supported ({'; '.join(compared)}). {' '.join(map(str, problems))}"
    )


def _parts(
    settings: Settings, layout: str, where: str = "the whole"
) -> Iterator[tuple[str, Settings, Architecture | PerceptionError]]:
    """Everything that settings describe, from the whole to what is nested in them: where it is
    described, the settings there, and the architecture, or why there is none."""
    try:
        arch = _architecture(settings, layout)
        yield where, settings, arch
        yield from ((where, settings, registry.architecture(name)) for name in arch.parts)
    except PerceptionError as error:
        yield where, settings, error
    for key, inner in settings.items():
        if key.endswith("_config") and _described(inner):
            yield from _parts(inner, layout, key)


def _described(value: Any) -> bool:
    """Whether a value among settings describes a model of its own."""
    return isinstance(value, Mapping) and "model_type" in value


def _paths(one: Identified) -> Iterable[str]:
    build = one.architecture.build
    return flatten(nnx.eval_shape(lambda: build(one.config, rngs=nnx.Rngs(params=0))))


def _fit(one: Identified, shapes: Shapes) -> tuple[float, float]:
    """Returns the shares of the names that the architecture has and of its rules that match."""
    paths = _paths(one) if one.layout == "jax" else ()
    table = one.architecture.table(one.layout, one.config, paths)
    names = [table.rename(name) for name in shapes]
    met, known = 0, set()
    for rule in table.rules:
        patterns = [matcher(source) for source in (*rule.sources, *rule.copies)]
        hits = {name for name in names if any(p.fullmatch(name) for p in patterns)}
        met += bool(hits)
        known |= hits
    return len(known) / max(1, len(names)), met / max(1, len(table.rules))
