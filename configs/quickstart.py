"""The first thing to run: a small CLIP learns to name drawings of an artist it never saw.

    make quickstart                                          # up to ten minutes on two cores
    make quickstart ARGS=--config=configs/quickstart.py:short           # about a minute

Trains on scenes of four artists (`configs/clip/scenes.py`, smaller and shorter), evaluates on the
fifth, writes `runs/quickstart/report.html` and a Hugging Face folder `runs/quickstart/hf`. Ctrl-C
saves; the same command goes on. `--config.data.source=DIR` trains on your own images and captions.
"""

from __future__ import annotations

import ml_collections

from configs.clip import scenes
from configs.clip.scenes import finish, get_task, report
from configs.common import parse_arg, trainer

__all__ = ["finish", "get_config", "get_task", "report"]


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Seven minutes of training; the argument `short` stops after a few steps."""
    short = parse_arg(arg, short=False).short
    config = scenes.get_config()
    config.train = trainer(
        steps=20 if short else 1400,
        batch_size=64 if short else 128,
        log_every=5 if short else 50,
        evaluate_every=0 if short else 350,
        checkpoint_every=0 if short else 175,
        optim={
            **scenes.OPTIM,
            "warmup_steps": 5 if short else 100,
        },
    )
    config.model.width = 128
    config.data.length = 1_500 if short else 30_000
    config.data.singles = 8
    config.evaluation.update({"per_name": 1 if short else 2, "scenes": 100 if short else 300})
    return config
