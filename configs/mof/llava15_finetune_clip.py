"""Stage 2 of LLaVA-1.5: 665k conversations, batches of images and of text alone.

    python -m launch.train --config=configs/mof/llava15_finetune_clip.py --workdir=runs/stage2 \\
        --config.projectors=runs/stage1/projectors
    python -m launch.train --config=configs/mof/llava15_finetune_clip.py:lora --workdir=runs/lora \\
        --config.projectors=runs/stage1/projectors
    python -m launch.plan --config=configs/mof/llava15_finetune_clip.py --slice=v5e-256

`:lora` trains LoRA of rank 128 instead of all weights. `:size=13b`, `:pixels=224`, and `:samples=N`
for the schedule of other data. The result is WORKDIR/llava, or WORKDIR/lora.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.mof.common import clip, finetune


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """16 × 8 rows, as `scripts/v1_5/finetune.sh` and `finetune_lora.sh` of LLaVA."""
    asked = parse_arg(arg, size="7b", pixels=336, lora=False, samples=0)
    return finetune(
        "clip",
        size=asked.size,
        pixels=asked.pixels,
        batch=128,
        samples=asked.samples,
        lora=asked.lora,
        order="modality",
        towers=(clip(asked.pixels),),
    )
