"""The training loop: mesh, abstract model, shardings, init or restore, data, step, log, evaluate,
checkpoint. It knows no system; `train.task.Task` is the protocol of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from perception_jax.errors import CheckpointError, PerceptionError, TrainingError
from perception_jax.files import write_whole
from perception_jax.shard import distributed, flops
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard.peers import Peers
from perception_jax.train import checkpoint
from perception_jax.train.config import TrainConfig
from perception_jax.train.feed import BatchFeed, DeviceBatch, described, signature
from perception_jax.train.interrupt import Interrupt, Stopped
from perception_jax.train.metrics import EVALUATE, Clock, Reporter
from perception_jax.train.profiling import StepTrace
from perception_jax.train.run_settings import RunSettings, require_same_everywhere
from perception_jax.train.state import TrainState, with_shardings
from perception_jax.train.step import FINITE_METRICS, VOTE, CompiledStep
from perception_jax.train.task import Batch, Metrics, Task
from perception_jax.train.task_step import TaskStep
from perception_jax.train.watchdog import Watchdog
from perception_jax.train.workdir import Workdir, open_workdir
from perception_jax.version import __version__

_log = logging.getLogger(__name__)

_PATIENCE = 30.0
"""Seconds that one of several processes waits for data after a signal."""

_SHOWN_IDS = 16
"""How many ids of the first batch are kept, to tell whether data that moved are the same."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
      model: with the trained weights (their moving average if `optim.ema` is set).
      metrics: of the last step and of the last evaluation.
      step: updates done.
      finished: False if it was stopped before `config.steps`.
    """

    model: nnx.Module
    metrics: Mapping[str, float]
    step: int
    finished: bool


def run(
    task: Task,
    config: TrainConfig,
    workdir: str | os.PathLike[str],
    *,
    resolved_config: Mapping[str, Any] | None = None,
    default_config: Mapping[str, Any] | None = None,
    may_change: Iterable[str] = (),
    stop: Callable[[int], bool] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainResult:
    """Trains, or goes on training, in `workdir` until `config.steps` are done.

    SIGTERM, SIGHUP or Ctrl-C finishes the step, saves and returns; so does `stop`. The same call
    then continues. An evaluation that a signal cuts short is made up for by the next call. On
    several hosts, `shard.distributed.initialize` must have been called; all of them stop together.

    Args:
      resolved_config: everything else that makes this run what it is (data, model), JSON-able;
        kept in the workdir, and resuming with another one is refused.
      default_config: `resolved_config` without what the user set. A run whose kept settings lack
        one of these had the default.
      may_change: dotted keys of `resolved_config` that a resumed run may change, because its
        batches do not depend on them (number of workers, where the data lie).
      stop: asked after each step with the step; True ends the run as SIGTERM does.
      devices: all by default.

    Raises:
      ConfigError: settings that cannot be, or that differ from those of the run in `workdir` or
        between processes.
      DataError: the dataset ends or yields batches of changing or unexpected shapes, or is not
        that of the run in `workdir`.
      TrainingError: the loss became NaN or infinite, or the workdir is in use, not shared by all
        processes or not writable.
      CheckpointError: a checkpoint cannot be written, or none can be read.
      Stopped: a signal came before the first step.
    """
    mesh = mesh_lib.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    accumulate = config.optim.accumulate
    mesh_lib.check_batch(mesh, config.batch_size, jax.process_count(), accumulate)
    settings = RunSettings.of(config, resolved_config, default_config, may_change)
    require_same_everywhere(settings)
    with contextlib.ExitStack() as stack:
        peers = stack.enter_context(Peers(config.heartbeat_seconds))
        home = distributed.together(
            "opening the workdir", lambda: stack.enter_context(open_workdir(workdir))
        )
        home.require_shared()
        stack.enter_context(jax.set_mesh(mesh))
        interrupt = stack.enter_context(Interrupt())
        kept = distributed.together("settings", lambda: _record_settings(home, settings))
        task_step = TaskStep.of(task, config, mesh)
        feed = distributed.together(
            "opening the data", lambda: _open_data(task_step, config, interrupt)
        )
        stack.callback(feed.close)
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(home.checkpoints, keep=config.keep, keep_best=config.keep_best)
        )
        restored = _restore(task_step, checkpoints, feed, settings.moved(kept))
        if restored is not None:
            _log.info("continuing %s from step %d", home.path, restored.step)
        trainer = _Trainer(
            task=task,
            config=config,
            mesh=mesh,
            task_step=task_step,
            feed=feed,
            checkpoints=checkpoints,
            home=home,
            settings=settings,
            interrupt=interrupt,
            stop=stop or (lambda _: False),
            ballots=distributed.Ballots(mesh),
            watchdog=Watchdog(home.path, config.watchdog_seconds),
            clock=Clock(
                batch_size=config.batch_size,
                devices=mesh.size,
                peak_flops=flops.peak_flops(mesh.devices.flat[0].device_kind),
            ),
            state=task_step.init() if restored is None else restored.state,
            restored=restored,
        )
        with peers.telling():
            return trainer.train()


def _record_settings(home: Workdir, settings: RunSettings) -> Mapping[str, Any]:
    """Process 0 compares and writes the settings; gives those kept in the newest checkpoint."""
    newest = max(checkpoint.steps(home.checkpoints), default=None)
    kept = None if newest is None else checkpoint.kept_settings(home.checkpoints / str(newest))
    if jax.process_index() == 0:
        home.record_config(settings, kept=kept)
    return kept or {}


def _open_data(step: TaskStep, config: TrainConfig, interrupt: Interrupt) -> BatchFeed:
    with interrupt.leaving() if jax.process_count() == 1 else contextlib.nullcontext():
        data, accumulate = step.task.datasets()["train"], config.optim.accumulate
        return BatchFeed(data, step.mesh, config.batch_size, step.batch_shapes, accumulate)


def _restore(
    step: TaskStep,
    checkpoints: checkpoint.Checkpoints,
    feed: BatchFeed,
    changed: Sequence[str],
) -> checkpoint.Restored | None:
    """The newest checkpoint that can be used, with the data set to its position; None for a new
    run. If settings have changed, the data must have the same records as before."""
    if changed:
        _log.warning("settings that may change have changed:\n  %s", "\n  ".join(changed))
    target = with_shardings(step.state, step.shardings)
    restored = checkpoints.restore(target, feed.iterator, lambda: step.init().frozen)
    first = [] if restored is None else restored.meta.get("first_ids")
    if changed and first:
        distributed.together(
            "comparing the data", lambda: feed.require_same_records(first, "; ".join(changed))
        )
    return restored


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step that was started and whose metrics were not fetched yet."""

    step: int
    metrics: Metrics
    ids: tuple[str, ...]
    compiled: CompiledStep


@dataclasses.dataclass(kw_only=True)
class _Trainer:
    """A run under way: what it uses (fixed), and where it stands (`state`, `step`, …)."""

    task: Task
    config: TrainConfig
    mesh: Mesh
    task_step: TaskStep
    feed: BatchFeed
    checkpoints: checkpoint.Checkpoints
    home: Workdir
    settings: RunSettings
    interrupt: Interrupt
    stop: Callable[[int], bool]
    ballots: distributed.Ballots
    watchdog: Watchdog
    clock: Clock

    state: TrainState
    restored: dataclasses.InitVar[checkpoint.Restored | None]

    def __post_init__(self, restored: checkpoint.Restored | None) -> None:
        self.step = 0 if restored is None else restored.step
        meta = {} if restored is None else restored.meta
        evaluation = None if restored is None else restored.evaluation
        self.training = dict(meta.get("training", {}))
        self.evaluation = dict(evaluation or {})
        self._first_ids = list(meta.get("first_ids", ()))
        self._saved_at = -1 if restored is None else self.step
        self._evaluated_at = -1 if evaluation is None else self.step
        self._compiled: list[CompiledStep] = []
        self._pending: _Pending | None = None
        self._stop_requested, self._votes = False, 0.0
        self._alone = not self.ballots.needed
        self._reporter = Reporter(
            self.home.path,
            step=self.step,
            steps=self.config.steps,
            tensorboard=self.config.tensorboard,
            active=jax.process_index() == 0,
            evaluated=evaluation is not None,
        )
        self._trace = StepTrace(
            self.home.path / "profile",
            first=self.config.profile_at if jax.process_index() == 0 else 0,
            count=self.config.profile_steps,
        )

    def train(self) -> TrainResult:
        closing = contextlib.closing
        with closing(self._reporter), closing(self._trace), self.watchdog:
            try:
                self._run()
            except Stopped:  # inside an evaluation or a wait for data
                if self.step == 0:
                    raise
                self._save()
            self.checkpoints.wait()
        finished = self.step >= self.config.steps and self._evaluated_at == self.step
        if not finished:
            _log.info("stopped at step %d; the same command continues from there", self.step)
        return TrainResult(
            self._current_model(), {**self.training, **self.evaluation}, self.step, finished
        )

    def _run(self) -> None:
        if self.step > 0 and self._wants_evaluation():
            self._evaluate()  # a stop or a failure cut it short
        stopping = False
        if self.step < self.config.steps:
            step = self.task_step
            self._compile([step.in_micro_batches(shape) for shape in step.batch_shapes])
        while self.step < self.config.steps and not stopping:
            self._advance()
            stopping = self._stops()
            evaluating = self._wants_evaluation()
            if evaluating or stopping or _due(self.step, self.config.checkpoint_every):
                self._save()
            if evaluating and (not stopping or self.step == self.config.steps):
                self._evaluate()

    def _wants_evaluation(self) -> bool:
        due = self.step >= self.config.steps or _due(self.step, self.config.evaluate_every)
        return due and self._evaluated_at != self.step

    def _stops(self) -> bool:
        """Whether the run stops after this step: at once if alone, else by the last votes read."""
        self._stop_requested = self.stop(self.step) or self.interrupt.requested
        return self._stop_requested if self._alone else self._votes > 0

    def _advance(self) -> None:
        """Starts one step, then checks the one before: the devices never wait for the host."""
        fed = self._next_batch()
        if not self._compiled:
            self._compile([fed.arrays])
        compiled = self._compiled[fed.shape]
        batch = self._with_vote(fed.arrays, self._stop_requested)
        self._trace.before(self.step + 1, self._finish_pending)
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            self.state, metrics = compiled.call(self.state, batch)
        self.step += 1
        self._finish_pending()
        self._pending = _Pending(self.step, metrics, fed.ids, compiled)
        self.watchdog.advanced(self.step)

    def _compile(self, shapes: Sequence[Batch]) -> None:
        """Compiles the step for each shape; all processes do so in the same order."""
        for number, shape in enumerate(shapes, start=1):
            start = time.perf_counter()
            with self.interrupt.leaving(0.0 if self._alone else math.inf):
                self._compiled.append(self.task_step.compile(self._with_vote(shape, stop=False)))
            _log.info(
                "compiled the step for shape %d of %d in %.1f s (%s)",
                number,
                len(shapes),
                time.perf_counter() - start,
                described(signature(shape)),
            )
        self.clock.restart()

    def _with_vote(self, batch: Batch, stop: bool) -> Batch:
        """The batch with this process's vote, if it is one of several."""
        return batch if self._alone else {**batch, VOTE: self.ballots.cast(stop)}

    def _next_batch(self) -> DeviceBatch:
        """Waits for the next batch. If none comes, the place in the data is the one before it."""
        place = self.feed.place()
        try:
            with self.clock.waiting(), self.interrupt.leaving(0.0 if self._alone else _PATIENCE):
                fed = self.feed.next()
        except BaseException as error:
            self.feed.stay_at(place)
            if isinstance(error, Exception):
                self._keep_what_is_done(error)
            elif isinstance(error, Stopped) and not self._alone:
                raise TrainingError(
                    f"a signal ended the wait for the data of step {self.step + 1}; the other "
                    "processes had started it, so nothing was saved. The same command goes on "
                    "from the newest checkpoint."
                ) from error
            raise
        self._first_ids = self._first_ids or list(fed.ids[:_SHOWN_IDS])
        return fed

    def _keep_what_is_done(self, error: Exception) -> None:
        """Saves the steps before data that cannot be had; raises Stopped if a signal is the cause.

        Only a process that is alone can: the others would not know that they should save.
        """
        if not self._alone:
            return
        if self.interrupt.requested:  # it reached the loading processes too
            raise Stopped from error
        try:
            self._save()
            self.checkpoints.wait()
        except PerceptionError as other:
            _log.error("%s", other)

    def _finish_pending(self) -> None:
        """Waits for the pending step, checks and reports it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        values = {key: float(value) for key, value in jax.device_get(pending.metrics).items()}
        self._votes = values.pop(VOTE, 0.0)
        if not all(math.isfinite(values[key]) for key in FINITE_METRICS):
            raise self._not_finite(pending, values)
        self.training = values
        self.clock.tick(
            model_flops=pending.compiled.model_flops,
            hardware_flops=pending.compiled.hardware_flops,
            tokens=values.get("tokens"),
        )
        self._reporter.advance(pending.step, values["loss"])
        if _due(pending.step, self.config.log_every):
            self.checkpoints.poll()
            self._reporter.training(pending.step, {**values, **self.clock.read()})
        elif pending.step == self.config.steps:  # too short a window for rates
            self._reporter.training(pending.step, values)

    def _evaluate(self) -> None:
        """Runs the evaluators on the model that was just saved."""
        self._finish_pending()
        model = self._current_model()
        # Several processes evaluate in step: none may leave alone, they vote in the model's calls.
        poll = distributed.Poll(self.ballots, lambda: self.interrupt.requested, Stopped)
        patience = 0.0 if self._alone else math.inf
        with self.interrupt.leaving(patience), distributed.polling(poll), self.watchdog.paused():
            found = {
                f"{EVALUATE}{name}/{key}": float(value)
                for name, evaluator in self.task.evaluators().items()
                for key, value in evaluator(model, self.mesh).items()
            }
        self.evaluation, self._evaluated_at = found, self.step
        if found:
            self._reporter.evaluation(self.step, found)
        self.checkpoints.record_evaluation(self.step, _finite(found))
        self.clock.restart()

    def _save(self) -> None:
        self._finish_pending()  # a step that is not finite must not be saved
        if self._saved_at == self.step or self.step == 0:
            return
        meta = {
            "library_version": __version__,
            **self.settings.to_json(),
            "training": _finite(self.training),
            "first_ids": self._first_ids,
        }
        self.checkpoints.save(self.step, self.state, self.feed.place(), meta)
        self._saved_at = self.step

    def _current_model(self) -> nnx.Module:
        averaged = self.state.ema
        trainable = self.state.trainable if averaged is None else averaged
        return self.task_step.model.merge(trainable, self.state.frozen)

    def _not_finite(self, pending: _Pending, values: Mapping[str, float]) -> TrainingError:
        file = self.home.path / f"not_finite_step_{pending.step}_host_{jax.process_index()}.json"
        write_whole(file, json.dumps({"ids": pending.ids}, indent=1) + "\n")
        with contextlib.suppress(CheckpointError):
            self.checkpoints.wait()  # a save under way is of a good step
        latest = self.checkpoints.latest
        good = (
            "there is no checkpoint yet"
            if latest is None
            else f"the last good checkpoint is step {latest} ({self.checkpoints.path(latest)})"
        )
        found = ", ".join(f"{key} {values[key]}" for key in FINITE_METRICS)
        return TrainingError(
            f"step {pending.step} is not finite ({found}); {good}. Records of that batch on this "
            f"host: {', '.join(pending.ids[:16]) or 'the loader gives no ids'}"
            f"{' …' if len(pending.ids) > 16 else ''} (all in {file}). Look at these records, "
            "lower optim.learning_rate or set optim.clip_norm, and start in a new workdir."
        )


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """What JSON can hold."""
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
