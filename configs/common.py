"""Common parts of config files: the `:ARG`, and shared blocks of settings."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

import ml_collections

from launch.common import UsageError
from perception_jax.errors import did_you_mean


def parse_arg(arg: str | None, **defaults: Any) -> ml_collections.ConfigDict:
    """The `:ARG` of `--config=FILE.py:ARG` as typed values.

    `"res=64,short"` sets `res` to 64 and the boolean `short` to True. It is meant for values that
    change several settings at once; single settings are `--config.KEY=VALUE`.

    Args:
      arg: what the command line says; None or "" leaves every default.
      defaults: every name that may be set, with its default, which gives the type.

    Returns:
      A locked ConfigDict with the names of `defaults`.

    Raises:
      UsageError: a name that is not among the defaults (the nearest ones are named), or a value of
        the wrong type.
    """
    values = ml_collections.ConfigDict(defaults)
    for part in (arg or "").split(","):
        name, _, text = (piece.strip() for piece in part.partition("="))
        if not name:
            continue
        if name not in defaults:
            raise UsageError(
                f"--config=FILE:{arg}: this config takes no {name!r}{did_you_mean(name, defaults)}"
            )
        kind = values.get_type(name)
        if kind is bool:
            text = {"": True, "true": True, "false": False}.get(text.lower(), text)
        try:
            values[name] = kind(text) if kind is not bool else text
        except (TypeError, ValueError):
            raise UsageError(
                f"--config=FILE:{arg}: {name} takes a value of type {kind.__name__}, "
                f"found {text!r}."
            ) from None
    return values.lock()


def trainer(*, steps: int, batch_size: int, **settings: Any) -> ml_collections.ConfigDict:
    """The settings of a training run: every field of `train.config.TrainConfig`.

    Args:
      settings: fields that differ from `TrainConfig`'s defaults; nested ones as mappings, e.g.
        `optim={"learning_rate": 3e-4}`.

    Raises:
      ConfigError: a field that `TrainConfig` does not have, or a value of the wrong type.
    """
    from perception_jax.train.config import TrainConfig

    return to_config_dict(
        TrainConfig.from_mapping({"steps": steps, "batch_size": batch_size, **settings})
    )


def to_config_dict(settings: Any) -> ml_collections.ConfigDict:
    """A dataclass as a ConfigDict: nested ones become groups, rows of dataclasses become tuples.

    A field that may be None keeps the type that it has otherwise, so the command line can set it.
    """
    hints = typing.get_type_hints(type(settings))
    config = ml_collections.ConfigDict()
    for field in dataclasses.fields(settings):
        value = _plain(getattr(settings, field.name))
        kind = _optional_of(hints[field.name])
        config[field.name] = (
            value if kind is None else ml_collections.FieldReference(value, field_type=kind)
        )
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(dataclasses.astuple(v) if dataclasses.is_dataclass(v) else v for v in value)
    return to_config_dict(value) if dataclasses.is_dataclass(value) else value


def _optional_of(hint: Any) -> type | None:
    """`T` of `T | None`; None for any other annotation."""
    if typing.get_origin(hint) not in (types.UnionType, typing.Union):
        return None
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) else None
