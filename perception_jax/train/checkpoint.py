"""Checkpoints: the complete state of a run, written with orbax.

    checkpoints/N/state/       arrays: step, trainable, opt_state, ema, key (nested dict)
    checkpoints/N/data/        position of the data iterator, one JSON per process
    checkpoints/N/meta/        meta.json: settings, library version, process count, digest of the
                               frozen leaves; leaves.json: shapes of all arrays
    checkpoints/N/files.json   sizes and checksums
    checkpoints/N/evaluation.json   what the evaluators found, once they have
    frozen/DIGEST/             the leaves that no step changes, see `train.frozen`

Saves run in the background and are atomic: a directory has its final name only once it is whole.
Checkpoints of older versions have the frozen leaves in `state`.
Restores take shapes and shardings from the running program, never from the files, so a run may
continue on another mesh. A damaged checkpoint is set aside and the one before it is used.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from perception_jax.errors import CheckpointError, PerceptionError
from perception_jax.files import write_whole
from perception_jax.shard import distributed
from perception_jax.train import checkpoint_parts, data_position, frozen, integrity, state_tree
from perception_jax.train.checkpoint_parts import JsonFiles, SummedArrays
from perception_jax.train.data_position import PositionFile
from perception_jax.train.keep import Keep
from perception_jax.train.state import Leaves, TrainState

_log = logging.getLogger(__name__)

_ORBAX_LOG = logging.getLogger("absl")
_EVALUATION = "evaluation.json"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored state; the data iterator has been moved to its position.

    `evaluation` is None if the evaluators have not run (to their end) at this step.
    """

    state: TrainState
    step: int
    meta: Mapping[str, Any]
    evaluation: Mapping[str, float] | None


class Checkpoints:
    """The checkpoints of one workdir, a context manager that waits for running saves."""

    def __init__(self, directory: pathlib.Path, *, keep: int, keep_best: str = "") -> None:
        """Opens the checkpoints; `keep` and `keep_best` as in `TrainConfig`."""
        _ORBAX_LOG.addFilter(_has_no_traceback)
        self._directory = directory
        self._saving: Any = None
        self._saving_step: int | None = None
        self._has_failed = False
        self._frozen: str | None = None
        self._keep = Keep(keep, keep_best)
        for step in steps(directory):
            self._keep.consider(step, _read_evaluation(directory / str(step)) or {})
        context = frozen.array_context()
        # A lambda, because a context deep-copies its options, and with a bound method its object.
        context.asynchronous.post_finalization_callback = lambda: self._seal()
        context.pytree.loading.partial_load = True
        self._orbax = ocp.training.Checkpointer(
            directory,
            context=context,
            preservation_policy=self._keep,
            cleanup_tmp_directories=True,  # what a killed save left behind
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return max(steps(self._directory), default=None)

    def path(self, step: int) -> pathlib.Path:
        """Path of the checkpoint of `step`, which need not exist."""
        return self._directory / str(step)

    def save(
        self,
        step: int,
        state: TrainState,
        data: Any,
        meta: Mapping[str, Any],
    ) -> None:
        """Starts to save; returns once the arrays are copied, so that a step may donate them.

        Args:
          data: state of the data iterator, JSON-able.
          meta: JSON-able.

        Raises:
          CheckpointError: this save or the one before it failed.
        """
        self.wait()
        own = {"step": step, "process_count": jax.process_count(), "ema": state.ema is not None}
        tree = state_tree.to_tree(state)
        shapes = state_tree.shapes(tree)
        constant = tree.pop("frozen")
        self._saving_step = step
        try:
            own["frozen"] = self._write_frozen(constant)
            files = JsonFiles({"meta.json": {**meta, **own}, "leaves.json": shapes})
            self._saving = self._orbax.save_checkpointables_async(
                step,
                {"state": SummedArrays("state", tree), "data": PositionFile(data), "meta": files},
                force=True,
            )
        except Exception as error:  # orbax and the file system raise many kinds
            raise self._failed(step, error) from error

    def _write_frozen(self, leaves: Leaves) -> str:
        """Writes the frozen leaves before the first checkpoint; returns their digest."""
        if self._frozen is None:
            self._frozen = frozen.digest(leaves) if leaves else ""
            if leaves:
                frozen.write(self._directory.parent / frozen.FOLDER, self._frozen, leaves)
        return self._frozen

    def record_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Adds what the evaluators found to the checkpoint of `step`, which is being or was saved.

        Raises:
          CheckpointError: that save failed, or the file cannot be written.
        """
        self.wait()
        self._keep.consider(step, values)
        if jax.process_index() == 0:
            try:
                write_whole(self.path(step) / _EVALUATION, json.dumps(dict(values)) + "\n")
            except OSError as error:
                raise self._failed(step, error) from error

    def poll(self) -> None:
        """Raises CheckpointError if a save in the background has failed."""
        if self._saving is not None and not self._orbax.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background; raises CheckpointError if it failed."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except Exception as error:
            raise self._failed(self._saving_step, error) from error

    def restore(
        self, target: TrainState, data: Any, again: Callable[[], Leaves] | None = None
    ) -> Restored | None:
        """Restores the newest undamaged checkpoint; None if there is no checkpoint.

        Args:
          target: shapes with shardings.
          data: a grain iterator, moved to the saved position.
          again: computes the frozen leaves of a new run. They replace frozen leaves that are
            missing or damaged, if they are the same.

        Raises:
          CheckpointError: checkpoints exist but all are damaged, or the newest whole one is of
            another model, cannot be loaded or lacks its frozen leaves.
          DataError: its position in the data is that of other data.
        """
        damaged: dict[int, str] = {}
        for step in self._agreed_steps():
            why = self._agreed_damage(step)
            if why:
                damaged[step] = why
                continue
            restored = self._load(step, target, data, again)
            self._set_aside(damaged, used=step)
            self._finish_deletions(used=step)
            return restored
        if damaged:
            listed = "\n  ".join(f"{self.path(step)}: {why}" for step, why in damaged.items())
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints can be used:\n  {listed}\nTo start a "
                "new run, use another workdir."
            )
        return None

    def _agreed_steps(self) -> list[int]:
        """Newest first; what process 0 sees, for the others may see files later."""
        found = json.dumps(sorted(steps(self._directory), reverse=True))
        return json.loads(distributed.exchange("checkpoints", found)[0])

    def _agreed_damage(self, step: int) -> str:
        """Describes the damage of a checkpoint; each process reads its share of the files."""
        path = self.path(step)
        return _shared_damage(path) or _agreed(
            lambda: "" if _read_meta(path) else "meta/meta.json is no settings"
        )

    def close(self) -> None:
        """Waits for the save in the background and ends orbax's threads.

        Raises:
          CheckpointError: that save failed.
        """
        try:
            self.wait()
        finally:
            try:
                self._orbax.close()
            except Exception as error:
                if not self._has_failed:  # else it is the error that was raised before
                    raise self._failed(self._saving_step, error) from error
            finally:
                if not self._has_failed:  # threads of a failed save may log after its end
                    _ORBAX_LOG.removeFilter(_has_no_traceback)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            _log.error("%s", error)  # the exception that is under way says more

    def _load(
        self, step: int, target: TrainState, data: Any, again: Callable[[], Leaves] | None
    ) -> Restored:
        path = self.path(step)
        meta = read_meta(path)
        tree = state_tree.to_tree(target)
        _require_fit(path, tree)
        if "frozen" in meta:
            constant = self._read_frozen(path, meta["frozen"], tree.pop("frozen"), again)
        distributed.together(
            "finding the position in the data",
            lambda: data_position.restore(
                path / "data", data, written_by=meta["process_count"], batches=step
            ),
        )
        try:
            loaded = self._orbax.load_checkpointables(step, {"state": tree})["state"]
        except Exception as error:  # orbax and the file system raise many kinds
            raise _unloadable(path, error) from error
        if "frozen" in meta:
            loaded["frozen"] = constant
        found = distributed.exchange("evaluation", json.dumps(_read_evaluation(path)))[0]
        return Restored(state_tree.from_tree(loaded, target), step, meta, json.loads(found))

    def _read_frozen(
        self,
        path: pathlib.Path,
        name: str,
        target: Leaves,
        again: Callable[[], Leaves] | None,
    ) -> Leaves:
        """The frozen leaves of the checkpoint at `path`; if need be those of a new run."""
        if not name:
            return {}
        folder = frozen.find(path, name)
        why = _shared_damage(folder)
        if not why:
            return distributed.together(
                "reading the frozen leaves", lambda: _read_frozen(path, name, target)
            )
        if again is None:
            raise frozen.unusable(path, name, why)
        try:
            leaves = again()
        except PerceptionError as error:
            raise frozen.unusable(path, name, f"{why}, and a new run fails ({error})") from error
        found = frozen.digest(leaves)
        if found != name:
            raise frozen.unusable(path, name, f"{why}, and a new run would have those of {found}")
        _log.warning(
            "the frozen leaves in %s cannot be used (%s); a new run has the same, which are taken "
            "and written again",
            folder,
            why,
        )
        root = self._directory.parent / frozen.FOLDER
        frozen.remove(root / name)
        frozen.write(root, name, leaves)
        return leaves

    def _set_aside(self, damaged: Mapping[int, str], *, used: int) -> None:
        """Moves damaged checkpoints out of the way of the run that is about to repeat them."""
        shelf = self._directory.parent / "damaged_checkpoints"
        for step, why in damaged.items():
            known = (self.path(step), why, shelf / str(step), used)
            _log.warning(
                "checkpoint %s is damaged (%s); it is moved to %s, training continues from step %d",
                *known,
            )
            if jax.process_index() == 0:
                shelf.mkdir(exist_ok=True)
                self.path(step).rename(_free_name(shelf, step))
        if damaged:
            distributed.exchange("damaged checkpoints are set aside", "")
            self._orbax.reload()

    def _finish_deletions(self, *, used: int) -> None:
        """Deletes older checkpoints, whole or half, that a killed run no longer could."""
        older = [step for step in self._agreed_steps() if step <= used]
        surplus = [step for step in older if step not in self._keep.steps(older)]
        if jax.process_index() == 0:
            for step in surplus:
                _log.info("deleting %s, which is not kept", self.path(step))
                shutil.rmtree(self.path(step), ignore_errors=True)
        if surplus:
            distributed.exchange("old checkpoints are deleted", "")
            self._orbax.reload()

    def _seal(self) -> None:
        """Runs when all files of a save are written, before its directory gets its name."""
        if jax.process_index() == 0 and self._saving_step is not None:
            for path in self._directory.glob(f"{self._saving_step}.*tmp*"):
                listed = checkpoint_parts.take_sums(path)
                for part in ("data", "meta"):
                    listed |= integrity.checksums(path / part, name=part)
                integrity.write_list(path, listed)

    def _failed(self, step: int | None, error: Exception) -> CheckpointError:
        self._has_failed = True
        latest = self.latest
        left = (
            "There is no earlier checkpoint."
            if latest is None
            else f"The checkpoint of step {latest} ({self.path(latest)}) is intact."
        )
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self._directory}: {error}\n"
            f"{left} Free disk space there, then run the same command again to continue."
        )


def steps(directory: pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints in a directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.is_dir() and p.name.isdecimal())


def read_leaves(path: pathlib.Path, target: Mapping[str, Leaves]) -> dict[str, Leaves]:
    """Reads some parts ("trainable", "frozen", "ema") of one checkpoint's state.

    Args:
      path: of the checkpoint, e.g. `workdir/checkpoints/1000`.
      target: per part, shapes with shardings by path.

    Raises:
      CheckpointError: damaged, or a leaf is missing or has another shape.
    """
    why = integrity.find_damage(path)
    if why:
        raise CheckpointError(f"checkpoint {path} is damaged: {why}. Use another step.")
    _require_fit(path, target)
    parts, constant = dict(target), {}
    name = read_meta(path).get("frozen")
    if name is not None and "frozen" in parts:
        constant["frozen"] = _read_whole_frozen(path, name, parts.pop("frozen"))
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            state = ocp.load_checkpointables(path, {"state": parts})["state"]
    except Exception as error:  # orbax and the file system raise many kinds
        raise _unloadable(path, error) from error
    # A run in progress deletes old checkpoints, and arrays without files are read as zeros.
    why = integrity.find_damage(path, contents=False)
    if why:
        raise CheckpointError(f"checkpoint {path} changed while it was read: {why}.")
    return {**state, **constant}


def _read_whole_frozen(path: pathlib.Path, name: str, target: Leaves) -> Leaves:
    """The frozen leaves of a checkpoint, all of whose files this process checks."""
    if not name:
        return {}
    why = integrity.find_damage(frozen.find(path, name))
    if why:
        raise frozen.unusable(path, name, why)
    return _read_frozen(path, name, target)


def _read_frozen(path: pathlib.Path, name: str, target: Leaves) -> Leaves:
    try:
        return frozen.read(frozen.find(path, name), name, target)
    except CheckpointError as error:
        raise frozen.unusable(path, name, str(error)) from error
    except Exception as error:  # orbax and the file system raise many kinds
        raise _unloadable(path, error) from error


def _shared_damage(path: pathlib.Path) -> str:
    """Describes the damage of a folder whose files the processes check together."""
    share = (jax.process_index(), jax.process_count())
    return _agreed(lambda: integrity.find_damage(path, share=share))


def _agreed(look: Callable[[], str]) -> str:
    """The first that any process finds."""
    found = distributed.together("checking a checkpoint", look)
    return next(filter(None, distributed.exchange("damage", found)), "")


def read_meta(path: pathlib.Path) -> dict[str, Any]:
    """`meta.json` of one checkpoint; raises CheckpointError if it has none."""
    meta = _read_meta(path)
    if not meta:
        raise CheckpointError(f"{path} is not a checkpoint of this library: no meta/meta.json.")
    return meta


def _has_no_traceback(record: logging.LogRecord) -> bool:
    """A filter: each of orbax's threads logs the error of a failed save, which is raised as one."""
    return not (record.exc_info and "orbax" in record.pathname)


def _unloadable(path: pathlib.Path, error: Exception) -> CheckpointError:
    why = integrity.find_damage(path, contents=False)
    if why:
        return CheckpointError(f"checkpoint {path} changed while it was read: {why}.")
    return CheckpointError(
        f"checkpoint {path} cannot be loaded, though its files are whole: "
        f"{type(error).__name__}: {error}. If memory has run out, free some or use more "
        "devices; then run the same command again."
    )


def saved_shapes(path: pathlib.Path) -> dict[str, Any]:
    """Shapes of a checkpoint's arrays, by part and path; raises CheckpointError without them."""
    saved = _read_object(path / "meta" / "leaves.json")
    if saved is None:
        raise CheckpointError(f"{path} is not a whole checkpoint: no list in meta/leaves.json.")
    return saved


def _require_fit(path: pathlib.Path, tree: Mapping[str, Any]) -> None:
    differing = state_tree.differences(tree, saved_shapes(path))
    if differing:
        raise CheckpointError(
            f"checkpoint {path} is of another model or optimizer:\n  {differing}\n"
            "Use the settings that it was trained with (config.json in the workdir)."
        )


def kept_settings(path: pathlib.Path) -> dict[str, Any]:
    """The settings stored in a checkpoint (see `train.run_settings`), without missing ones."""
    meta = _read_meta(path)
    groups = {key: meta.get(key) for key in ("trainer", "config")}
    return {key: value for key, value in groups.items() if isinstance(value, dict) and value}


def _read_meta(path: pathlib.Path) -> dict[str, Any]:
    """{} if it is missing or not what a save writes."""
    meta = _read_object(path / "meta" / "meta.json") or {}
    whole = isinstance(meta.get("process_count"), int) and isinstance(meta.get("step"), int)
    return meta if whole and isinstance(meta.get("ema"), bool) else {}


def _read_evaluation(path: pathlib.Path) -> dict[str, float] | None:
    """What the evaluators found; None if they have not run to their end."""
    found = _read_object(path / _EVALUATION)
    # Checkpoints of older versions were saved after the evaluation and hold it themselves.
    return found if found is not None else _read_meta(path).get("evaluation") or None


def _read_object(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _free_name(shelf: pathlib.Path, step: int) -> pathlib.Path:
    names = (shelf / (f"{step}" if n == 0 else f"{step}.{n}") for n in range(1_000_000))
    return next(path for path in names if not path.exists())
