"""GiVE on CLIP ViT-B/16, the research default: ten epochs of MOInst.

python -m launch.train --config=configs/give/clip_b16.py --workdir=runs/give_clip_b16
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.give.common import published


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Takes no argument."""
    parse_arg(arg)
    return published("openai/clip-vit-base-patch16", size=224, steps=2350)
