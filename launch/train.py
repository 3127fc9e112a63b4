"""Trains what a config file describes, or goes on with it.

python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart
"""

from __future__ import annotations

import logging
import pathlib
import sys

from launch import common
from perception_jax.errors import ConfigError

PROGRAM = common.Program(
    name="train",
    description=(
        "Trains what a config file describes. Run it again with the same workdir and it goes on "
        "where it stopped; SIGTERM and Ctrl-C save first. If the config file defines "
        "finish(config, task, model, workdir), that follows the last step. Several hosts: start "
        "it on each of them (on a TPU slice they find each other; PERCEPTION_JAX_DISTRIBUTED=0 "
        "keeps a host alone)."
    ),
    flags=(
        common.Flag(
            "workdir",
            pathlib.Path,
            help="Folder of this run: checkpoints, metrics.jsonl, config.json.",
            required=True,
        ),
    ),
    examples=(
        "python -m launch.train --config=configs/quickstart.py --workdir=runs/quickstart",
        "python -m launch.train --config=configs/quickstart.py:short --workdir=runs/short "
        "--config.train.seed=1",
    ),
)


def run(parsed: common.Parsed) -> int:
    """Trains; returns 0 also when it was asked to stop and has saved."""
    from perception_jax.shard import distributed
    from perception_jax.train import loop
    from perception_jax.train.config import TrainConfig

    _log_to_stderr()
    distributed.initialize()
    if "train" not in parsed.config or not hasattr(parsed.module, "get_task"):
        raise ConfigError(
            f"{parsed.config_path}: to train, a config file needs a block `train` (see "
            "configs.common.trainer) and a function get_task(config)."
        )
    resolved = parsed.config.to_dict()
    workdir = parsed.flags["workdir"]
    task = parsed.module.get_task(parsed.config)
    result = loop.run(
        task,
        TrainConfig.from_mapping(resolved["train"]),
        workdir,
        resolved_config=resolved,
    )
    values = "  ".join(f"{key} {value:.4g}" for key, value in result.metrics.items())
    if result.finished:
        print(f"{workdir}: {result.step} steps done  {values}")
        if hasattr(parsed.module, "finish"):
            parsed.module.finish(parsed.config, task, result.model, workdir)
    else:
        print(f"{workdir}: stopped at step {result.step}; the same command continues from there")
    return 0


def _log_to_stderr() -> None:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for chatty in ("absl", "jax"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(common.main(PROGRAM, run))
