"""GiVE on your own images: copy this file, point it to a JSONL file, run it.

    python -m launch.train --config=configs/give/forkme.py --workdir=runs/mine \
        --config.data.source=my/objects.jsonl

One object a line; image, class and caption are needed, and an image may have several lines:

    {"image": "photos/1.jpg", "class": "kite", "caption": "a red kite above the trees"}

Fifty images are enough to run. Paths are relative to the file. `box` ([x1, y1, x2, y2] in pixels)
and `instruction` are read where they are given; every tenth image is kept for testing.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg, trainer
from configs.give.common import RULES, blocks, data


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Takes no argument."""
    parse_arg(arg)
    config = blocks(groups=4, images=4)
    # Hub id or folder of a CLIP, SigLIP or EVA-CLIP.
    config.backbone = "openai/clip-vit-base-patch16"
    config.train = trainer(
        steps=500,
        batch_size=32,
        log_every=10,
        evaluate_every=100,
        checkpoint_every=100,
        optim={
            "name": "muon",
            "learning_rate": 1e-3,
            "weight_decay": 0.05,
            "b2": 0.98,
            "warmup_steps": 50,
            "rules": RULES,
        },
    )
    config.data = data(
        "objects.jsonl", kind="objects", test_every=10, size=224, mode="llava_pad", hold=True
    )
    config.evaluation.name = "own"
    config.report.update(
        {
            "title": "GiVE on your images",
            "measured_on": "every tenth image, which was not trained on",
        }
    )
    return config
