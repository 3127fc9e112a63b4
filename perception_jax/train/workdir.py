"""The directory of a run: one process at a time, one config.

workdir/
  config.json       the resolved settings of the run
  metrics.jsonl     see `train.metrics`
  checkpoints/N/    see `train.checkpoint`
  frozen/DIGEST/    see `train.frozen`
  .lock             who is training here now
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from perception_jax.errors import ConfigError, TrainingError
from perception_jax.files import write_whole
from perception_jax.shard import distributed
from perception_jax.train.run_settings import MAY_CHANGE, RunSettings, compare

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """A locked workdir with the paths of its contents."""

    path: pathlib.Path

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.path / "checkpoints"

    @property
    def config(self) -> pathlib.Path:
        return self.path / "config.json"

    def record_config(self, settings: RunSettings, *, kept: Mapping[str, Any] | None) -> None:
        """Compares the settings with those of the run so far, then writes them to `config.json`.

        Args:
          kept: the settings in the newest checkpoint ({} if it has none); None for a new run.

        Raises:
          ConfigError: resuming with other settings; the message lists them.
          TrainingError: `config.json` cannot be written.
        """
        if kept is not None:
            sources = {self.config: self._read_config(), "the newest checkpoint": kept}
            if not any(sources.values()):
                raise ConfigError(
                    f"expected the settings of the run in {self.config} or in its checkpoints, "
                    "found none: they cannot be compared with this start. Put "
                    "config.json back, or start a new run in another workdir."
                )
            for source, old in sources.items():
                if old:
                    self._require_continuation(old, settings, source)
        text = json.dumps(settings.to_json(), indent=2, sort_keys=True) + "\n"
        with write_errors_explained(self.config):
            # On a full disk a run can only resume if nothing is written before what its failed save
            # left behind is removed.
            if not (self.config.is_file() and self.config.read_bytes() == text.encode()):
                write_whole(self.config, text)

    def _require_continuation(self, old: Mapping[str, Any], new: RunSettings, source: Any) -> None:
        found = compare(old, new)
        if found.forbidden:
            free = ", ".join([*sorted(MAY_CHANGE), *sorted(new.free)])
            raise ConfigError(
                f"{self.path} holds a run with other settings (kept in {source}):\n  "
                + "\n  ".join(found.forbidden)
                + f"\nA run may change only {free} (steps upward). "
                "Use the old settings to continue it, or another workdir for a new run."
            )
        if found.filled:
            _log.warning(
                "%s lacks settings that this version has; taken as\n  %s",
                source,
                "\n  ".join(found.filled),
            )

    def _read_config(self) -> dict[str, Any]:
        """`config.json`; {} with a word in the log if it is missing or damaged."""
        why = "is missing"
        try:
            content = json.loads(self.config.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                return content
            why = f"should hold an object, not {type(content).__name__}"
        except FileNotFoundError:
            pass
        except (OSError, ValueError, RecursionError) as error:
            why = f"cannot be read ({error})"
        _log.warning(
            "%s %s; the settings in the newest checkpoint are compared instead, and the file is "
            "rewritten",
            self.config,
            why,
        )
        return {}

    def require_shared(self) -> None:
        """Shows that all processes see this same directory.

        Raises:
          TrainingError: one of them sees another; its path and host are named.
        """
        if jax.process_count() == 1:
            return
        token = self.path / f".token-{secrets.token_hex(8)}"
        where = f"{self.path} on {socket.gethostname()}"
        with contextlib.ExitStack() as stack:
            if jax.process_index() == 0:
                token.touch()
                stack.callback(token.unlink, missing_ok=True)
            name = distributed.exchange("token in the workdir", token.name)[0]
            seen = _appears(self.path / name)
            places = distributed.exchange("workdir", "" if seen else where)
            first = distributed.exchange("first workdir", where)[0]
        apart = [f"process {i}: {place}" for i, place in enumerate(places) if place]
        if apart:
            raise TrainingError(
                f"all processes of a run need one shared workdir, found process 0: {first}, and "
                f"apart from it {'; '.join(apart)}. Give a directory that all hosts mount."
            )


@contextlib.contextmanager
def open_workdir(path: str | os.PathLike[str]) -> Iterator[Workdir]:
    """Creates the directory if needed and locks it.

    The lock is the kernel's (`flock`): it ends with the process, however that dies.

    Raises:
      ConfigError: not a local path.
      TrainingError: another process trains there, or the directory cannot be written.
    """
    if "://" in str(path):
        raise ConfigError(f"workdir {path}: {_mount_recipe(str(path))}")
    path = pathlib.Path(path).expanduser().resolve()
    with write_errors_explained(path):
        path.mkdir(parents=True, exist_ok=True)
    with _lock(path) if jax.process_index() == 0 else contextlib.nullcontext():
        yield Workdir(path)


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    # Opened without truncation: until the lock is ours, the file tells who holds it.
    with contextlib.ExitStack() as stack:
        with write_errors_explained(path / ".lock"):
            file = stack.enter_context((path / ".lock").open("a+", encoding="utf-8"))
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
        with contextlib.suppress(OSError):  # a full disk; the lock holds without an owner's name
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        try:
            yield
        finally:
            file.truncate(0)


@contextlib.contextmanager
def write_errors_explained(path: pathlib.Path) -> Iterator[None]:
    """Turns an OSError (a full or read-only disk) into one clear error about `path`."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror or error}. Checkpoints written so far are "
            "intact; free disk space or correct the permissions there, then run the same command "
            "again."
        ) from error


def _mount_recipe(url: str) -> str:
    """Why a bucket cannot be a workdir, and how it can."""
    bucket, _, rest = url.partition("://")[2].partition("/")
    message = (
        "expected a path of a file system that locks files and renames folders, found a URL. "
        "A run locks its workdir, appends to its metrics and renames each finished checkpoint."
    )
    if url.startswith("gs://") and bucket:
        message += (
            " Mount the bucket on every host (best is one with a hierarchical namespace, which "
            f"renames folders at once): gcsfuse --implicit-dirs --rename-dir-limit=100000 {bucket} "
            f"/mnt/{bucket}; then use the workdir /mnt/{bucket}/{rest}."
        )
    return message


def _appears(path: pathlib.Path) -> bool:
    """Whether the file is there; network file systems may show it some seconds late."""
    for _ in range(20):
        if path.exists():
            return True
        os.scandir(path.parent).close()  # asks the server anew
        time.sleep(0.25)
    return False
