"""Settings shared by the configs that train a language model.

The recipe is LLaVA-1.5's second stage (arXiv 2310.03744) without images: AdamW without weight
decay, 3 % of warm-up, cosine to 0; LoRA of rank 128 on every linear layer of the blocks at ten
times the learning rate.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from configs.common import trainer

RATE, LORA_RATE = 2e-5, 2e-4
"""Learning rates of all weights and of LoRA."""


def recipe(
    model: str, *, length: int, batch_size: int, steps: int, lora: bool, **train: Any
) -> ml_collections.ConfigDict:
    """Everything but the data's source.

    Args:
      model: hub id or folder; "" draws the weights of `scratch`.
      length: tokens of a row.
      lora: whether LoRA trains on a frozen model instead of all weights.
      train: settings of the trainer that differ from the recipe's.
    """
    config = ml_collections.ConfigDict({"system": "text", "model": model})
    optim = {
        "learning_rate": LORA_RATE if lora else RATE,
        "weight_decay": 0.0,
        "warmup_steps": -(-3 * steps // 100),
        **train.pop("optim", {}),
    }
    config.train = trainer(steps=steps, batch_size=batch_size, optim=optim, **train)
    # Rank 0 trains all weights. The scale is alpha / rank; `layers` are paths of linear layers.
    config.lora = ml_collections.ConfigDict(
        {
            "rank": 128 if lora else 0,
            "alpha": 256.0,
            "dropout": 0.05,
            "rank_stabilized": False,
            "layers": (r"blocks/.*",),
        }
    )
    # What the backward pass recomputes: "none", "full", "dots" or "dots_no_batch" (`nn.stack`).
    config.remat = "full"
    # Tokens of each row whose logits are computed at a time.
    config.chunk = 256
    config.data = ml_collections.ConfigDict(
        {
            # "scenes", or a file with a "conversation" or a "text" in each record (see
            # `data.sources`).
            "source": "scenes",
            "kind": "",
            # Test records; "" keeps every so many of the source, and 0 of them does not test.
            "test": "",
            "test_every": 0,
            # Tokens of a row, and whether several records share one. What is longer is cut.
            "length": length,
            "packed": True,
            # Of conversations; "auto" takes that of the tokenizer's files.
            "template": "auto",
            # Share of the records that may be skipped as unusable, in training and evaluation.
            "max_bad_fraction": 0.01,
            # Loading processes; 0 loads in threads.
            "workers": 0,
            # Scenes only: how many.
            "scenes": 4000,
        }
    )
    # Rows per device call, and for "scenes" the number of conversations that test.
    config.evaluation = ml_collections.ConfigDict({"batch_size": batch_size, "scenes": 200})
    # Model and tokenizer ("bytes", or a folder) where `model` is "".
    config.scratch = ml_collections.ConfigDict(
        {
            "tokenizer": "bytes",
            "vocab_size": 264,
            "context": 2048,
            "width": 256,
            "depth": 6,
            "heads": 4,
            "kv_heads": 4,
            "head_width": 64,
            "mlp_dim": 768,
            "tied": False,
        }
    )
    return config
