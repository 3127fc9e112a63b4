"""The directory of a run: one owner at a time, one config for its whole life.

workdir/
  config.json       the resolved settings of the run
  metrics.jsonl     see `train.metrics`
  checkpoints/N/    see `train.checkpoint`
  .lock             who is training here now
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from perception_jax.errors import ConfigError, TrainingError
from perception_jax.files import write_whole
from perception_jax.train.config import TrainConfig

MAY_CHANGE = frozenset(
    (
        "steps",
        "log_every",
        "evaluate_every",
        "checkpoint_every",
        "keep",
        "keep_best",
        "tensorboard",
        "mesh",
    )
)
"""Trainer settings that a resumed run may change (`steps` only upward)."""


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A locked workdir; paths of what is in it."""

    path: pathlib.Path

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def config(self) -> pathlib.Path:
        return self.path / "config.json"

    def settle_config(
        self, config: TrainConfig, resolved: Mapping[str, Any] | None, *, resuming: bool
    ) -> None:
        """Compares the settings with those of the run so far, then writes them to `config.json`.

        Raises:
          ConfigError: resuming with other settings; the message lists them.
        """
        new = {"trainer": dataclasses.asdict(config), "config": dict(resolved or {})}
        new = json.loads(json.dumps(new, default=str))
        if resuming and self.config.exists():
            differing = _forbidden_changes(json.loads(self.config.read_text()), new)
            if differing:
                raise ConfigError(
                    f"{self.path} holds a run with other settings:\n  "
                    + "\n  ".join(differing)
                    + f"\nA run may change only {', '.join(sorted(MAY_CHANGE))} (steps upward). "
                    "Use the old settings to continue it, or another workdir for a new run."
                )
        if jax.process_index() == 0:
            write_whole(self.config, json.dumps(new, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike[str]) -> Iterator[Workdir]:
    """Creates the directory if need be and holds its lock.

    The lock is the kernel's (`flock`): it ends with the process, however that dies.

    Raises:
      ConfigError: not a local path.
      TrainingError: another process trains there.
    """
    if "://" in str(path):
        raise ConfigError(
            f"workdir {path}: expected a path of a (mounted) file system, found a URL."
        )
    path = pathlib.Path(path).expanduser().resolve()
    path.mkdir(parents=True, exist_ok=True)
    with _lock(path) if jax.process_index() == 0 else contextlib.nullcontext():
        yield Workdir(path)


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    # Opened without truncation: until the lock is ours, the file tells who holds it.
    with (path / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise TrainingError(
                f"workdir {path} is in use by {owner}. Wait for that run, stop it (it then saves a "
                "checkpoint), or choose another workdir."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _forbidden_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = _dotted(old), _dotted(new)
    lines: dict[str, str] = {}
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, _ABSENT), after.get(key, _ABSENT)
        setting = _shown(key)
        block, _, name = setting.partition(".")
        name = name.split(".")[0]
        free = block == "train" and name in MAY_CHANGE
        fewer = name == "steps" and _is_int(was) and _is_int(now) and now < was
        if was != now and (fewer or not free):
            lines[setting] = f"{setting}: {was!r} before, {now!r} now"
    return list(lines.values())


def _shown(key: str) -> str:
    """`trainer.seed` and `config.train.seed` are the same setting: "train.seed"."""
    if key.startswith("trainer."):
        return f"train.{key.removeprefix('trainer.')}"
    return key.removeprefix("config.")


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
