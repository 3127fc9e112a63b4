"""The settings of a run: what a resumed run may change, and whether all processes have the same.

Settings are kept twice: in `config.json` and in each checkpoint. `trainer` is the `TrainConfig`,
`config` everything else that makes the run what it is.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from perception_jax.errors import ConfigError
from perception_jax.shard import distributed
from perception_jax.train.config import TrainConfig
from perception_jax.version import __version__

MAY_CHANGE = frozenset(
    (
        "steps",
        "log_every",
        "evaluate_every",
        "checkpoint_every",
        "keep",
        "keep_best",
        "tensorboard",
        "profile_at",
        "profile_steps",
        "mesh",
        "watchdog_seconds",
        "heartbeat_seconds",
    )
)
"""Trainer settings that a resumed run may change (`steps` only upward)."""

_TRAIN = "train."


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The settings with which a run is started.

    Attributes:
      trainer, config: JSON-able; see the module.
      defaults: of `config`: what a run has where its own settings do not say, None if unknown.
      free: dotted keys of `config` that may change between starts and between processes: what the
        batches do not depend on.
    """

    trainer: Mapping[str, Any]
    config: Mapping[str, Any]
    defaults: Mapping[str, Any] | None = None
    free: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        resolved: Mapping[str, Any] | None,
        defaults: Mapping[str, Any] | None = None,
        free: Iterable[str] = (),
    ) -> RunSettings:
        """Converts settings to the form that JSON returns."""
        return cls(
            _as_json(dataclasses.asdict(config)),
            _as_json(dict(resolved or {})),
            None if defaults is None else _as_json(dict(defaults)),
            frozenset(free),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the form stored in `config.json` and checkpoints."""
        return {"trainer": self.trainer, "config": self.config}

    def moved(self, old: Mapping[str, Any]) -> list[str]:
        """The free settings that differ from `old`, as "key: old before, new now"."""
        was, now = _dotted(old.get("config", {})), _dotted(self.config)
        return [
            f"{key}: {was[key]!r} before, {now[key]!r} now"
            for key in sorted(self.free & was.keys() & now.keys())
            if was[key] != now[key]
        ]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences of settings from those of the run so far.

    Attributes:
      forbidden: changes that a resumed run may not make.
      filled: settings that the run did not keep, and the values that they have now.
    """

    forbidden: list[str]
    filled: list[str]


def compare(old: Mapping[str, Any], new: RunSettings) -> Comparison:
    """Compares the kept settings `old` (see `RunSettings.to_json`) with those of this start."""
    lines: dict[str, str] = {}
    filled: dict[str, str] = {}
    was, lacking = _trainer_of(old)
    for key, now in _dotted(new.trainer).items():
        name = key.split(".")[0]
        if was is None or was.get(key, _ABSENT) == now:
            continue
        fewer = name == "steps" and _is_int(was.get(key)) and _is_int(now) and now < was[key]
        if fewer or name not in MAY_CHANGE:
            lines[_TRAIN + key] = f"{_TRAIN}{key}: {was.get(key, _ABSENT)!r} before, {now!r} now"
    for key in lacking:
        filled[_TRAIN + key] = f"{_TRAIN}{key}: the default {was[key]!r}"  # type: ignore[index]
    before, after = _dotted(old.get("config", {})), _dotted(new.config)
    default = {} if new.defaults is None else _dotted(new.defaults)
    for key in sorted(before.keys() | after.keys()):
        is_trainer_s = was is not None and key.startswith(_TRAIN)
        old_value, now = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if old_value == now or is_trainer_s or key in new.free:
            continue
        if old_value is _ABSENT and key in default and default[key] == now:
            filled[key] = f"{key}: the default {now!r}"
        else:
            lines[key] = f"{key}: {old_value!r} before, {now!r} now"
    return Comparison(
        [lines[key] for key in sorted(lines)], [filled[key] for key in sorted(filled)]
    )


def require_same_everywhere(settings: RunSettings) -> None:
    """Compares the settings of all processes, so that none waits for one that does other work.

    Raises:
      ConfigError: they differ; the message lists how.
    """
    if jax.process_count() == 1:
        return
    own = {
        **{f"{_TRAIN}{key}": value for key, value in _dotted(settings.trainer).items()},
        **{k: v for k, v in _dotted(settings.config).items() if not k.startswith(_TRAIN)},
        "version of perception_jax": __version__,
        "version of jax": jax.__version__,
    }
    own = {key: value for key, value in own.items() if key not in settings.free}
    first, *others = map(json.loads, distributed.exchange("settings", json.dumps(own)))
    for index, other in enumerate(others, start=1):
        if other != first:
            listed = "\n  ".join(
                f"{key}: {first.get(key, _ABSENT)!r} on process 0, "
                f"{other.get(key, _ABSENT)!r} on process {index}"
                for key in sorted(first.keys() | other.keys())
                if first.get(key, _ABSENT) != other.get(key, _ABSENT)
            )
            raise ConfigError(
                f"the processes of this run have different settings:\n  {listed}\n"
                "Start the same command on all of them."
            )


def _trainer_of(old: Mapping[str, Any]) -> tuple[dict[str, Any] | None, list[str]]:
    """The kept trainer settings, dotted, with defaults where they say nothing; and those keys.

    Checkpoints of older versions hold no `trainer`, but the block `train` of the config.
    """
    kept = old.get("trainer")
    if not isinstance(kept, Mapping):
        config = old.get("config")
        kept = config.get("train") if isinstance(config, Mapping) else None
    if not isinstance(kept, Mapping):
        return None, []
    known = _known(TrainConfig, kept)
    try:
        complete = _as_json(dataclasses.asdict(TrainConfig.from_mapping(known)))
    except (ConfigError, TypeError):  # not what this version can be: compared unchanged
        return _dotted(kept), []
    whole = _dotted(complete)
    return whole, sorted(key for key in whole if not _has(kept, key))


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without what the dataclass no longer has."""
    hints = typing.get_type_hints(cls)
    return {
        key: _known(hints[key], value)
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping)
        else value
        for key, value in values.items()
        if key in hints
    }


def _has(tree: Mapping[str, Any], key: str) -> bool:
    for name in key.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _dotted(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _is_int(value: Any) -> bool:
    return isinstance(value, int)


class _Absent:
    def __repr__(self) -> str:
        return "not set"


_ABSENT = _Absent()
