"""Quickstart: trains GiVE's adapters on a small CLIP.

    make quickstart                                          # up to ten minutes on two cores
    make quickstart ARGS=--config=configs/quickstart.py:short           # about a minute

GiVE's adapters train on scenes of four artists around the shipped CLIP (`configs/give/scenes.py`,
shorter) and are measured on the fifth. Writes `runs/quickstart/report.html`, the adapters
`give.safetensors` and a folder `hf` with both. Ctrl-C saves; the same command resumes.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg, trainer
from configs.give import scenes


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """About five minutes of training; the argument `short` stops after a few steps."""
    short = parse_arg(arg, short=False).short
    config = scenes.get_config()
    groups, images = (4, 4) if short else (8, 6)
    config.sampler.update({"groups": groups, "images": images})
    config.train = trainer(
        steps=20 if short else 1500,
        batch_size=2 * groups * images,
        log_every=5 if short else 25,
        evaluate_every=10 if short else 500,
        checkpoint_every=0 if short else 500,
        optim={**scenes.OPTIM, "warmup_steps": 5 if short else 100},
    )
    # The backbone's own size: a step takes less than half the time that it takes at 72 px.
    config.data.size = 48
    config.data.length = 300 if short else 8_000
    config.evaluation.update({"scenes": 40 if short else 200})
    return config
