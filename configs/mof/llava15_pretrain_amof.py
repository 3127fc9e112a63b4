"""Stage 1 of Additive Mixture of Features: the projector learns 595k captions.

    python -m launch.train --config=configs/mof/llava15_pretrain_amof.py:ssl=0.75 --workdir=runs/s

`:ssl` is the share of DINOv2 in the sum of features. The paper has 0, 0.25, 0.5, 0.625, 0.75, 0.875
and 1, each trained in both stages, on the first LLaVA (Vicuna 1.3) at 224 pixels; there is no code
of it. Here it is on LLaVA-1.5. `:lr=RATE`, `:pixels=336`, `:size=7b` and `:samples=N` as in the
other recipes.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.mof.common import CC_595K, DINOV2, clip, pretrain


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Vicuna 13B, CLIP ViT-L/14 and DINOv2 ViT-L/14 at 224 pixels."""
    asked = parse_arg(arg, size="13b", pixels=224, ssl=0.75, lr=1e-3, samples=0)
    return pretrain(
        "mof",
        size=asked.size,
        pixels=asked.pixels,
        batch=256,
        rate=asked.lr,
        samples=asked.samples,
        data=CC_595K,
        towers=(clip(asked.pixels), DINOV2),
        mixing="additive",
        mixing_ratio=1 - asked.ssl,
    )
