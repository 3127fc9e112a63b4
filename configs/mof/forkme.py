"""A LLaVA on your own conversations about images: copy this file, point it to a JSONL file, run it.

    python -m launch.train --config=configs/mof/forkme.py --workdir=runs/mine \\
        --config.data.source=my/chats.jsonl

One conversation a line; fifty are enough to run. Paths are relative to the file, a line without
"image" is text alone, and every tenth line is kept for testing:

    {"image": "photos/1.jpg",
     "conversation": [{"role": "user", "text": "<image>\\nWhat is this?"},
                      {"role": "assistant", "text": "A red kite above the trees."}]}

LLaVA's own format ("conversations" with "from" and "value", also as one JSON list) is read too.

LoRA is trained on LLaVA-1.5 7B, and written to WORKDIR/lora for PEFT, with the projector; `:all`
trains all weights of the language model, and writes WORKDIR/llava. `:samples=N` is the number of
your conversations, for the schedule. `:runlocal` trains a tiny model on drawn scenes from scratch,
without downloads.
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg
from configs.mof.common import LORA_RATE, RATE, base


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """Three epochs."""
    asked = parse_arg(arg, samples=50, all=False, runlocal=False)
    if asked.runlocal:
        return _runlocal()
    config = base(
        model={"whole": "liuhaotian/llava-v1.5-7b"},
        division={"rows": 8, "devices": 1, "accumulate": 1},
        samples=asked.samples,
        rate=RATE if asked.all else LORA_RATE,
        trains="all" if asked.all else "lora",
        tokens=576,
        rooms=(192, 448, 960),
        epochs=3,
        log_every=1,
        evaluate_every=20,
        checkpoint_every=100,
    )
    config.data.update({"source": "chats.jsonl", "test_every": 10, "workers": 2})
    return config


def _runlocal() -> ml_collections.ConfigDict:
    """A minute on two cores: the shipped CLIP, and a language model of bytes from scratch."""
    config = base(
        model={"towers": ("scenes-clip",), "image_aspect": "pad"},
        division={"rows": 4, "devices": 2, "accumulate": 1},
        samples=240,
        rate=3e-3,
        trains="all",
        tokens=16,
        rooms=(),
        max_length=448,
        epochs=1,
        compute_dtype="float32",
        frozen_dtype="float32",
        checkpoint_every=0,
    )
    config.data.update({"order": "modality", "template": "auto", "workers": 0, "hold": True})
    config.evaluation.scenes = 24
    sizes = {"width": 64, "depth": 2, "kv_heads": 2, "head_width": 16, "mlp_dim": 128}
    config.scratch.update(sizes)
    return config
