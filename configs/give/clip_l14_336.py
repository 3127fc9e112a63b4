"""GiVE on CLIP ViT-L/14 at 336 px, the encoder of LLaVA-1.5: twenty epochs of MOInst.

python -m launch.train --config=configs/give/clip_l14_336.py --workdir=runs/give_clip_l14_336
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.give.common import published


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Takes no argument."""
    parse_arg(arg)
    return published("openai/clip-vit-large-patch14-336", size=336, steps=4700)
