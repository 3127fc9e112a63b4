"""Stage 1 of Interleaved Mixture of Features on LLaVA-1.5: both projectors learn 595k captions.

    python -m launch.train --config=configs/mof/llava15_pretrain_imof.py --workdir=runs/stage1

As MoF's `pretrain.sh`: 336 pixels, 1,152 tokens of an image, two micro-batches of 16 × 8 rows. The
paper's table is of 224 pixels (`:pixels=224`) and has the learning rate 2e-3 (`:lr=0.002`).
`:size=7b` and `:samples=N` as in the other recipes.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.mof.common import CC_595K, DINOV2, clip, pretrain


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Vicuna 13B, CLIP ViT-L/14 and DINOv2 ViT-L/14."""
    asked = parse_arg(arg, size="13b", pixels=336, lr=1e-3, samples=0)
    return pretrain(
        "mof",
        size=asked.size,
        pixels=asked.pixels,
        batch=256,
        rate=asked.lr,
        samples=asked.samples,
        data=CC_595K,
        towers=(clip(asked.pixels), DINOV2),
        mixing="interleaved",
    )
