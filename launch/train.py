"""Trains the task of a config file, or resumes its run.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
    python -m launch.train --config=configs/quickstart.py:short --workdir=runs/short \
        --config.train.seed=1

Run it again with the same workdir and it resumes where it stopped; SIGTERM, SIGHUP and Ctrl-C save
first. After the last step the system writes its report and exports its model. Several hosts: start
it on each of them (on a TPU slice they find each other; PERCEPTION_JAX_DISTRIBUTED=0 keeps a host
alone).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pathlib
import tempfile
from typing import Any

from absl import flags

from launch import common, compile_cache
from perception_jax.errors import ConfigError

MAY_CHANGE = (
    "data.workers",
    "data.source",
    "data.images",
    "data.test",
    "parts",
    "remat",
    "remat.text",
    "remat.vision",
)
"""Settings of a config that a resumed run may change: the batches do not depend on how many
processes load them, nor on where the same data are, and a step not on what is computed again."""

STOPPED_CODE = "PERCEPTION_JAX_STOPPED_CODE"
"""Environment variable: the exit code of a run that was stopped before its last step; 0 by default.
What starts a run again after a preemption needs another one to tell it from a run that is done."""


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this program."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of this run: checkpoints, metrics.jsonl, config.json.",
        required=True,
        flag_values=values,
    )


PROGRAM = common.Program(name="train", define=define_flags, config=True)
"""The command line of this program."""


def run(parsed: common.Parsed) -> int:
    """Trains; returns 0, or `STOPPED_CODE` when it was asked to stop and has saved."""
    from launch.systems import training_program
    from perception_jax.shard import distributed
    from perception_jax.train import loop
    from perception_jax.train.config import TrainConfig
    from perception_jax.train.interrupt import Stopped

    stopped = _stopped_code()
    _log_to_stderr()
    compile_cache.skip_several_cpu_devices()
    if "train" not in parsed.config:
        raise ConfigError(
            f"{parsed.config_path}: to train, a config file needs a block `train` (see "
            "configs.common.trainer)."
        )
    config = TrainConfig.from_mapping(parsed.config.train.to_dict())
    distributed.initialize(heartbeat_seconds=config.heartbeat_seconds)
    program = training_program(parsed.config)
    resolved, workdir = parsed.config.to_dict(), pathlib.Path(parsed.flags.workdir)
    task = program.task(parsed.config)
    try:
        result = loop.run(
            task,
            config,
            workdir,
            resolved_config=resolved,
            default_config=parsed.defaults.to_dict(),
            may_change=MAY_CHANGE,
        )
    except Stopped:
        _say(f"{workdir}: stopped before the first step; the same command starts again")
        return stopped
    values = "  ".join(f"{key} {value:.4g}" for key, value in result.metrics.items())
    if not result.finished:
        _say(f"{workdir}: stopped at step {result.step}; the same command continues from there")
        return stopped
    _say(f"{workdir}: {result.step} steps done  {values}")
    _finish(program, parsed.config, task, result.model, workdir)
    return 0


def _stopped_code() -> int:
    text = os.environ.get(STOPPED_CODE, "0")
    if not text.isdecimal() or int(text) > 255:
        raise ConfigError(f"{STOPPED_CODE}: expected an exit code up to 255, found {text!r}.")
    return int(text)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # after SIGHUP there is no terminal
        print(text, flush=True)


def _finish(program: Any, config: Any, task: Any, model: Any, workdir: pathlib.Path) -> None:
    """Calls the system's `finish` with a model that this process can read whole.

    On several processes all of them call it, for it may compute together; the files of the first
    are kept.
    """
    import jax
    from flax import nnx

    from perception_jax.ops.sharding import gathered
    from perception_jax.shard import distributed

    if jax.process_count() == 1:
        program.finish(config, task, model, workdir)
        return
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(jax.numpy.asarray, gathered(state)))
    with contextlib.ExitStack() as stack:
        if jax.process_index() > 0:
            workdir = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        distributed.together("finish", lambda: program.finish(config, task, model, workdir))


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for chatty in ("absl", "jax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


if __name__ == "__main__":
    common.start(PROGRAM, run)
