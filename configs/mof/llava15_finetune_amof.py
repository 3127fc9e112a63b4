"""Stage 2 of Additive Mixture of Features: 665k conversations.

    python -m launch.train --config=configs/mof/llava15_finetune_amof.py:ssl=0.5 --workdir=runs/s \\
        --config.projectors=runs/stage1/projectors

`:ssl` as in stage 1, batch 128 as in the paper (`:batch=176` as in MoF's script), random order.
`:pixels=336`, `:lora`, `:size=7b` and `:samples=N` as in the other recipes.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.mof.common import DINOV2, clip, finetune


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Vicuna 13B, CLIP ViT-L/14 and DINOv2 ViT-L/14 at 224 pixels."""
    asked = parse_arg(arg, size="13b", pixels=224, ssl=0.75, batch=128, lora=False, samples=0)
    return finetune(
        "mof",
        size=asked.size,
        pixels=asked.pixels,
        batch=asked.batch,
        samples=asked.samples,
        lora=asked.lora,
        order="random",
        towers=(clip(asked.pixels), DINOV2),
        mixing="additive",
        mixing_ratio=1 - asked.ssl,
    )
