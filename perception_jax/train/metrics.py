"""Output of a run: `metrics.jsonl`, a progress bar or log lines, TensorBoard files.

A line of `metrics.jsonl` is one JSON object with "step" and either training metrics ("loss" and
more, see `train.step`, with the rates of `Clock`) or the values of evaluators, as
"evaluate/NAME/KEY". Numbers that are not finite are written as null.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import tqdm

from perception_jax.errors import ConfigError, TrainingError
from perception_jax.files import write_whole

EVALUATE = "evaluate/"
"""Prefix of evaluation metrics."""

_log = logging.getLogger(__name__)


class Clock:
    """Measures rates since the last `read`."""

    def __init__(self, *, batch_size: int, devices: int, peak_flops: float | None) -> None:
        """`peak_flops`: of one device per second, None if unknown (MFU and HFU are then null)."""
        self._batch_size, self._devices, self._peak = batch_size, devices, peak_flops
        self._begin = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Starts a new window, e.g. after an evaluation."""
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0
        self._model_flops = self._hardware_flops = 0
        self._tokens: float | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens inside as waiting for input."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def tick(self, *, model_flops: int, hardware_flops: int, tokens: float | None = None) -> None:
        """Counts a finished step.

        Args:
          model_flops, hardware_flops: of this step's shape, all devices together.
          tokens: of the global batch, padding left out; None where the task counts none.
        """
        self._steps += 1
        self._model_flops += model_flops
        self._hardware_flops += hardware_flops
        if tokens is not None:
            self._tokens = (self._tokens or 0.0) + tokens

    def read(self) -> dict[str, float | None]:
        """Rates of the window, and a new window.

        "examples_per_second_per_chip", "mfu" (model FLOPs by peak FLOPs) and "hfu" (the same with
        what is computed a second time) per JAX device, "input_wait" in [0, 1], "seconds" since this
        process began to train; "tokens_per_second_per_chip" where the task counts tokens.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rate = self._steps / elapsed
        rates = {
            "examples_per_second_per_chip": rate * self._batch_size / self._devices,
            "mfu": self._utilisation(self._model_flops / elapsed),
            "hfu": self._utilisation(self._hardware_flops / elapsed),
            "input_wait": min(self._waited / elapsed, 1.0),
            "seconds": time.perf_counter() - self._begin,
        }
        if self._tokens is not None:
            rates["tokens_per_second_per_chip"] = self._tokens / elapsed / self._devices
        self.restart()
        return rates

    def _utilisation(self, flops_per_second: float) -> float | None:
        return flops_per_second / (self._peak * self._devices) if self._peak else None


class Reporter:
    """Writes `metrics.jsonl`, the progress bar or log lines, and TensorBoard files.

    Lines of steps that a resumed run will do again are dropped first, so that the file always
    reads as one uninterrupted run.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        step: int,
        steps: int,
        tensorboard: bool,
        active: bool,
        evaluated: bool = True,
    ) -> None:
        """Opens the outputs.

        Args:
          step, steps: steps done and in all.
          evaluated: whether the evaluation at `step` has been reported.
          active: whether this process reports.

        Raises:
          ConfigError: TensorBoard is requested and tensorboardX is not installed.
          TrainingError: the disk does not take the file.
        """
        self._steps, self._active = steps, active
        self._board = _tensorboard(workdir) if tensorboard and active else None
        self._path = workdir / "metrics.jsonl"
        self._file = self._open(step, evaluated) if active else None
        self._bar = None
        if active and sys.stderr.isatty():
            self._bar = tqdm.tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def advance(self, step: int, loss: float) -> None:
        """Moves the bar to `step`."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            with contextlib.suppress(OSError):  # the terminal is gone; the run is not
                self._bar.update(step - self._bar.n)

    def training(self, step: int, values: Mapping[str, float | None]) -> None:
        """Reports training metrics; raises TrainingError if the disk does not take them."""
        self._write(step, values)
        if self._bar is None:
            self._tell(step, values)

    def evaluation(self, step: int, values: Mapping[str, float | None]) -> None:
        """Reports the values of evaluators; raises TrainingError as `training` does."""
        self._write(step, values)
        self._tell(step, values)

    def close(self) -> None:
        for writer in (self._bar, self._file, self._board):
            if writer is not None:
                with contextlib.suppress(OSError):  # no terminal, no disk: each line was flushed
                    writer.close()

    def _open(self, step: int, evaluated: bool) -> io.TextIOWrapper:
        def stays(line: Mapping[str, Any]) -> bool:
            again = line["step"] == step and not evaluated and "loss" not in line
            return line["step"] <= step and not again

        try:
            if self._path.exists():
                lines, damaged = _parse(self._path)
                if damaged:
                    aside = _free_name(self._path)
                    shutil.copyfile(self._path, aside)
                    _log.warning(
                        "%s: %d lines cannot be read (%s) and are dropped; the file as it was is "
                        "kept as %s",
                        self._path,
                        len(damaged),
                        "; ".join(damaged[:3]),
                        aside.name,
                    )
                kept = [json.dumps(line) + "\n" for line in lines if stays(line)]
                write_whole(self._path, "".join(kept))
            return self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def _write(self, step: int, values: Mapping[str, float | None]) -> None:
        if self._file is None:
            return
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error
        if self._board is not None:
            for key, value in finite.items():
                if value is not None:
                    self._board.add_scalar(key, value, step)

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"cannot write {self._path}: {error}. Checkpoints written so far are intact; "
            "free disk space and run the same command again."
        )

    def _tell(self, step: int, values: Mapping[str, float | None]) -> None:
        if not self._active:
            return
        shown = {k.removeprefix(EVALUATE): v for k, v in values.items() if v is not None}
        text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        if self._bar is None:
            _log.info("step %d/%d  %s", step, self._steps, text)
        else:
            with contextlib.suppress(OSError):
                self._bar.write(f"step {step}/{self._steps}  {text}", file=sys.stderr)


def read_metrics(workdir: str | pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` in order; [] if there is none.

    Damaged lines are left out and named in the log; a last line that a killed process left
    unfinished is left out without a word.
    """
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines, damaged = _parse(path)
    if damaged:
        _log.warning(
            "%s: %d lines cannot be read and are left out (%s)",
            path,
            len(damaged),
            "; ".join(damaged[:3]),
        )
    return lines


def _parse(path: pathlib.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines that can be read, and what is wrong with the others."""
    *texts, unfinished = path.read_bytes().split(b"\n")
    lines: list[dict[str, Any]] = []
    damaged = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
            else:
                damaged.append(f"line {number}: no object with a step")
        except (ValueError, RecursionError) as error:
            damaged.append(f"line {number}: {error}")
    with contextlib.suppress(ValueError, RecursionError):
        line = json.loads(unfinished)  # whole, but for its line end
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
    return lines, damaged


def _free_name(path: pathlib.Path) -> pathlib.Path:
    names = (path.with_name(f"{path.stem}.damaged-{n}{path.suffix}") for n in range(1, 1_000_000))
    return next(name for name in names if not name.exists())


def _tensorboard(workdir: pathlib.Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard=True needs tensorboardX: run `pip install tensorboardX`, or leave it off; "
            "metrics.jsonl has the same numbers."
        ) from error
    return SummaryWriter(str(workdir / "tensorboard"))
