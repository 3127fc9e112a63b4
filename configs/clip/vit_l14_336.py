"""CLIP ViT-L/14 at 336 px from scratch, in batches of 32,768 as published (arXiv 2103.00020).

    python -m launch.train --config=configs/clip/vit_l14_336.py --workdir=runs/clip_l14_336 \
        --config.data.source=DIR

The optimizer's settings are those of ViT-L/14 (table 19). The paper trained it at 224 px and for
one more epoch at 336; here all steps are at 336. What it takes on a slice: `docs/scale.md`.
"""

from __future__ import annotations

import ml_collections

from configs.clip.common import published
from configs.common import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Takes no argument."""
    parse_arg(arg)
    return published(
        "openai/clip-vit-large-patch14-336",
        loss="softmax",
        steps=390_625,
        optim={
            "learning_rate": 4e-4,
            "weight_decay": 0.2,
            "b2": 0.98,
            "eps": 1e-6,
            "warmup_steps": 2000,
        },
    )
