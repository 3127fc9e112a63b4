"""GiVE on SigLIP SO400M/14 at 384 px: twenty epochs of MOInst.

python -m launch.train --config=configs/give/siglip_so400m.py --workdir=runs/give_siglip_so400m
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.give.common import published


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Takes no argument."""
    parse_arg(arg)
    return published("google/siglip-so400m-patch14-384", size=384, steps=4700, mode="squash")
