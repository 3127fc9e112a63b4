"""Fine-tunes a language model on conversations or texts of your own.

    python -m launch.train --config=configs/text/finetune.py --workdir=runs/mine \
        --config.data.source=chats.jsonl
    python -m launch.train --config=configs/text/finetune.py:lora,length=2048 --workdir=runs/lora \
        --config.model=DIR --config.data.source=chats.jsonl

One record a line, and every tenth is kept for testing:

    {"conversation": [{"role": "user", "text": "What is a kite?"},
                      {"role": "assistant", "text": "A toy that flies."}]}
    {"text": "A passage, of which every token is predicted."}

`:lora` trains LoRA, which is written to WORKDIR/lora for PEFT; otherwise WORKDIR/hf is a folder of
Hugging Face. `:length=N` and `:batch=N` are the tokens of a row and the rows of a batch.
`:runlocal` trains a tiny model from scratch on conversations about scenes, without downloads.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.text.common import recipe


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """SmolLM2-135M-Instruct; the argument is that of the module."""
    asked = parse_arg(arg, runlocal=False, lora=False, length=1024, batch=32)
    if asked.runlocal:
        return _runlocal()
    config = recipe(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        length=asked.length,
        batch_size=asked.batch,
        steps=1000,
        lora=asked.lora,
        log_every=10,
        evaluate_every=200,
        checkpoint_every=200,
    )
    config.data.update({"source": "chats.jsonl", "test_every": 10})
    return config


def _runlocal() -> ml_collections.ConfigDict:
    """A minute on two cores."""
    config = recipe(
        "",
        length=256,
        batch_size=8,
        steps=60,
        lora=False,
        log_every=10,
        checkpoint_every=0,
        optim={"learning_rate": 3e-3},
    )
    config.data.scenes = 400
    config.evaluation.scenes = 40
    sizes = {"width": 64, "depth": 2, "kv_heads": 2, "head_width": 16, "mlp_dim": 128}
    config.scratch.update({"context": 256, **sizes})
    return config
