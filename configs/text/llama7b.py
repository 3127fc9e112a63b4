"""Vicuna 7B on conversations of 2,623 tokens at batch 128: all weights, or LoRA.

    python -m launch.train --config=configs/text/llama7b.py --workdir=runs/vicuna \
        --config.data.source=chats.jsonl --config.train.mesh.tensor=2
    python -m launch.train --config=configs/text/llama7b.py:lora --workdir=runs/vicuna_lora \
        --config.data.source=chats.jsonl
    python -m launch.plan --config=configs/text/llama7b.py --slice=v5e-256 \
        --config.train.mesh.tensor=2

2,623 tokens are the 2,048 of a text and the 575 that an image of 336 pixels adds.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.text.common import recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One epoch of 665k conversations, each in a row of its own.

    `lora` trains LoRA, in micro-batches and on frozen weights in bfloat16.
    """
    lora = parse_arg(arg, lora=False).lora
    spared = {"optim": {"accumulate": 8, "accumulate_mean": "tokens"}, "frozen_dtype": "bfloat16"}
    config = recipe(
        "lmsys/vicuna-7b-v1.5",
        length=2623,
        batch_size=128,
        steps=5196,
        lora=lora,
        log_every=10,
        checkpoint_every=500,
        compute_dtype="bfloat16",
        **(spared if lora else {}),
    )
    config.data.update(
        {"packed": False, "source": "chats.jsonl", "template": "vicuna_v1", "workers": 8}
    )
    return config
