"""The training loop: mesh, abstract model, shardings, init or restore, data, step, log, evaluate,
checkpoint. It knows no system; `train.task.Task` is what it asks of one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from perception_jax.errors import CheckpointError, TrainingError
from perception_jax.files import write_whole
from perception_jax.shard import distributed, flops
from perception_jax.shard import mesh as mesh_lib
from perception_jax.train import checkpoint
from perception_jax.train.config import TrainConfig
from perception_jax.train.feed import Feed
from perception_jax.train.interrupt import Interrupt
from perception_jax.train.metrics import EVALUATE, Clock, Reporter
from perception_jax.train.optim import make_optimizer
from perception_jax.train.state import (
    AbstractModel,
    TrainState,
    abstract_model,
    abstract_state,
    init_state,
    state_shardings,
    with_shardings,
)
from perception_jax.train.step import FINITE_METRICS, CompiledStep, compile_step, make_step
from perception_jax.train.task import Metrics, Task
from perception_jax.train.workdir import Workdir, open_workdir
from perception_jax.version import __version__

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run gave.

    Attributes:
      model: with the trained weights (their moving average if `optim.ema` is set).
      metrics: of the last step and of the last evaluation.
      step: batches trained on.
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
    stop: Callable[[int], bool] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainResult:
    """Trains, or goes on training, in `workdir` until `config.steps` are done.

    SIGTERM or Ctrl-C finishes the step, saves and returns; so does `stop`. The same call then
    continues. On several hosts, `shard.distributed.initialize` must have been called.

    Args:
      resolved_config: everything else that makes this run what it is (data, model), JSON-able;
        kept in the workdir, and resuming with another one is refused.
      stop: asked after each step with the step; True ends the run as SIGTERM does.
      devices: all by default.

    Raises:
      ConfigError: settings that cannot be, or that differ from those of the run in `workdir`.
      DataError: the dataset ends or yields batches of changing or unexpected shapes.
      TrainingError: the loss became NaN or infinite, or the workdir is in use.
      CheckpointError: a checkpoint cannot be written, or none can be read.
    """
    mesh = mesh_lib.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    mesh_lib.check_batch(mesh, config.batch_size, jax.process_count())
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(open_workdir(workdir))
        stack.enter_context(jax.set_mesh(mesh))
        interrupt = stack.enter_context(Interrupt())
        resuming = bool(checkpoint.steps(home.checkpoints))
        home.settle_config(config, resolved_config, resuming=resuming)

        model = abstract_model(task)
        optimizer = make_optimizer(config.optim, config.steps, model.trainable)
        abstract = abstract_state(model, optimizer.transform, ema=config.optim.ema is not None)
        shardings = state_shardings(abstract, task.shardings, mesh)
        step = make_step(
            task, model, optimizer, compute_dtype=config.compute_dtype, ema=config.optim.ema
        )
        feed = Feed(task.datasets()["train"], mesh, config.batch_size)
        stack.callback(feed.close)
        checkpoints = stack.enter_context(
            checkpoint.Checkpoints(home.checkpoints, keep=config.keep, keep_best=config.keep_best)
        )
        restored = checkpoints.restore(with_shardings(abstract, shardings), feed.iterator)
        if restored is None:
            state = init_state(task, optimizer.transform, shardings, config.seed)
        else:
            state = restored.state
            _log.info("continuing %s from step %d", home.path, restored.step)
        trainer = _Trainer(
            task=task,
            config=config,
            model=model,
            compile=lambda batch: compile_step(step, abstract, shardings, batch, mesh),
            feed=feed,
            checkpoints=checkpoints,
            home=home,
            config_to_save=dict(resolved_config or {}),
            wish=lambda done: bool(stop is not None and stop(done)) or interrupt.requested,
            agree=distributed.Agreement(mesh),
            clock=Clock(
                batch_size=config.batch_size,
                devices=mesh.size,
                peak_flops=flops.peak_flops(mesh.devices.flat[0].device_kind),
            ),
            state=state,
            step=restored.step if restored else 0,
            training=dict(restored.meta["training"]) if restored else {},
            evaluation=dict(restored.meta["evaluation"]) if restored else {},
        )
        return trainer.train()


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step that was started and whose metrics were not yet looked at."""

    step: int
    metrics: Metrics
    ids: tuple[str, ...]


@dataclasses.dataclass(kw_only=True)
class _Trainer:
    """A run under way: what it uses (fixed), and where it stands (`state`, `step`, …)."""

    task: Task
    config: TrainConfig
    model: AbstractModel
    compile: Callable[[Any], CompiledStep]
    feed: Feed
    checkpoints: checkpoint.Checkpoints
    home: Workdir
    config_to_save: Mapping[str, Any]
    wish: Callable[[int], bool]
    agree: distributed.Agreement
    clock: Clock

    state: TrainState
    step: int
    training: dict[str, float]
    evaluation: dict[str, float]

    def __post_init__(self) -> None:
        self._compiled: CompiledStep | None = None
        self._pending: _Pending | None = None
        self._evaluated_at = self.step if self.evaluation else -1
        self._reporter = Reporter(
            self.home.path,
            step=self.step,
            steps=self.config.steps,
            tensorboard=self.config.tensorboard,
            active=jax.process_index() == 0,
        )

    def train(self) -> TrainResult:
        stopping = False
        with contextlib.closing(self._reporter):
            while self.step < self.config.steps and not stopping:
                self._advance()
                stopping = self.agree(self.wish(self.step))
                last = self.step == self.config.steps
                if last or _due(self.step, self.config.evaluate_every):
                    self._evaluate()
                if last or stopping or _due(self.step, self.config.checkpoint_every):
                    self._save()
            finished = self.step >= self.config.steps
            if finished and self._evaluated_at != self.step:  # resumed after a stop at the end
                self._evaluate()
            self.checkpoints.wait()
        if not finished:
            _log.info("stopped at step %d; the same command continues from there", self.step)
        return TrainResult(
            self._current_model(), {**self.training, **self.evaluation}, self.step, finished
        )

    def _advance(self) -> None:
        """Starts one step, then looks at the one before: the devices never wait for the host."""
        with self.clock.waiting():
            fed = self.feed.next()
        if self._compiled is None:
            self._compiled = self.compile(fed.arrays)
            self.clock.model_flops = self._compiled.model_flops
            self.clock.hardware_flops = self._compiled.hardware_flops
            self.clock.restart()
        self.state, metrics = self._compiled.call(self.state, fed.arrays)
        self.step += 1
        self._settle()
        self._pending = _Pending(self.step, metrics, fed.ids)

    def _settle(self) -> None:
        """Waits for the pending step, checks and reports it."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        values = {key: float(value) for key, value in jax.device_get(pending.metrics).items()}
        if not all(math.isfinite(values[key]) for key in FINITE_METRICS):
            raise self._not_finite(pending, values)
        self.training = values
        self.clock.tick()
        self._reporter.advance(pending.step, values["loss"])
        if _due(pending.step, self.config.log_every):
            self.checkpoints.poll()
            self._reporter.training(pending.step, {**values, **self.clock.read()})
        elif pending.step == self.config.steps:  # too short a window for rates
            self._reporter.training(pending.step, values)

    def _evaluate(self) -> None:
        self._settle()
        model = self._current_model()
        self.evaluation = {
            f"{EVALUATE}{name}/{key}": float(value)
            for name, evaluator in self.task.evaluators().items()
            for key, value in evaluator(model).items()
        }
        self._evaluated_at = self.step
        if self.evaluation:
            self._reporter.evaluation(self.step, self.evaluation)
        self.clock.restart()

    def _save(self) -> None:
        self._settle()  # a step that is not finite must not be saved
        meta = {
            "library_version": __version__,
            "config": self.config_to_save,
            "training": _finite(self.training),
            "evaluation": _finite(self.evaluation) if self._evaluated_at == self.step else {},
        }
        self.checkpoints.save(self.step, self.state, self.feed.iterator, meta)

    def _current_model(self) -> nnx.Module:
        averaged = self.state.ema
        trainable = self.state.trainable if averaged is None else averaged
        return self.model.merge(trainable, self.state.frozen)

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
