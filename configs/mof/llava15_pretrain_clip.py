"""Stage 1 of LLaVA-1.5: the projector learns 558k captions.

    python -m launch.train --config=configs/mof/llava15_pretrain_clip.py --workdir=runs/stage1
    python -m launch.train --config=configs/mof/llava15_pretrain_clip.py:lr=0.002 --workdir=runs/s1

`:size=13b`, `:pixels=224`, `:lr=RATE` (MoF's paper has 2e-3, its scripts and LLaVA-1.5's 1e-3) and
`:samples=N` for the schedule of other data. WORKDIR/projectors is for stage 2.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.mof.common import LLAVA_558K, clip, pretrain


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """32 × 8 rows, as `scripts/v1_5/pretrain.sh` of LLaVA."""
    asked = parse_arg(arg, size="7b", pixels=336, lr=1e-3, samples=0)
    return pretrain(
        "clip",
        size=asked.size,
        pixels=asked.pixels,
        batch=256,
        rate=asked.lr,
        samples=asked.samples,
        data=LLAVA_558K,
        towers=(clip(asked.pixels),),
    )
