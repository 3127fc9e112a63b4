"""SigLIP SO400M/14 at 384 px from scratch: sigmoid loss, batches of 32,768 (arXiv 2303.15343).

    python -m launch.train --config=configs/siglip/so400m14_384.py --workdir=runs/so400m \
        --config.data.source=DIR

Batch size, learning rate, decay and b2 are the paper's; the number of steps (5 billion pairs), the
warm-up and AdamW are this library's. The vocabulary is fetched from the hub. What it takes on a
slice: `docs/scale.md`.
"""

from __future__ import annotations

import ml_collections

from configs.clip.common import published
from configs.common import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Takes no argument."""
    parse_arg(arg)
    return published(
        "google/siglip-so400m-patch14-384",
        loss="sigmoid",
        steps=152_588,
        optim={
            "learning_rate": 1e-3,
            "weight_decay": 1e-4,
            "b2": 0.95,
            "warmup_steps": 10_000,
        },
        # 256 chips do not divide a width of 1,152: the model would be whole on each of them.
        mesh={"replica": -1, "fsdp": 64},
        # On v5e-256 the attention of all 128 images of a chip would not fit beside what is kept.
        parts=2,
    )
