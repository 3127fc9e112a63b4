"""CLIP ViT-B/16 from scratch: batches of 32,768 as published (arXiv 2103.00020, tables 18 and 19).

    python -m launch.train --config=configs/clip/vit_b16.py --workdir=runs/clip_b16 \
        --config.data.source=DIR

32 epochs of 400 million pairs. What it takes on a slice: `docs/scale.md`.
"""

from __future__ import annotations

import ml_collections

from configs.clip.common import published
from configs.common import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Takes no argument."""
    parse_arg(arg)
    return published(
        "openai/clip-vit-base-patch16",
        loss="softmax",
        steps=390_625,
        optim={
            "learning_rate": 5e-4,
            "weight_decay": 0.2,
            "b2": 0.98,
            "eps": 1e-6,
            "warmup_steps": 2000,
        },
    )
