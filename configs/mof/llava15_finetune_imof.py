"""Stage 2 of Interleaved Mixture of Features on LLaVA-1.5: 665k conversations.

    python -m launch.train --config=configs/mof/llava15_finetune_imof.py --workdir=runs/stage2 \\
        --config.projectors=runs/stage1/projectors

As MoF's `finetune.sh`: two micro-batches of 11 × 8 rows (176; the paper says 128: `:batch=128`), in
random order, 336 pixels (the paper's table: `:pixels=224`). Conversations without an image, which
its code cannot run, are trained on as in LLaVA. `:lora`, `:size=7b` and `:samples=N` as in the
other recipes; `--config.reference_adapter_collision=True` starts as its code does.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.mof.common import DINOV2, clip, finetune


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Vicuna 13B, CLIP ViT-L/14 and DINOv2 ViT-L/14."""
    asked = parse_arg(arg, size="13b", pixels=336, batch=176, lora=False, samples=0)
    return finetune(
        "mof",
        size=asked.size,
        pixels=asked.pixels,
        batch=asked.batch,
        samples=asked.samples,
        lora=asked.lora,
        order="random",
        towers=(clip(asked.pixels), DINOV2),
        mixing="interleaved",
    )
