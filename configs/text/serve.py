"""Serving of a language model: what `launch.plan` compiles.

    python -m launch.plan --config=configs/text/serve.py --slice=v5e-4,v5e-8
    python -m launch.plan --config=configs/text/serve.py --slice=v5e-1 \\
        --config.model=vicuna_13b --config.int8=True
"""

from __future__ import annotations

import ml_collections

from configs.common import parse_arg


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One text at a time, split over all chips."""
    parse_arg(arg)
    config = ml_collections.ConfigDict()
    config.system = "text"
    config.model = "vicuna_7b"  # or vicuna_13b, smollm2_135m, …, or a folder or hub id
    config.batch_size = 1
    config.prompt = 1024  # tokens of the prefill: the length of a bucket
    config.context = 2048  # tokens that the cache has room for
    config.dtype = "bfloat16"  # of weights and cache
    config.int8 = False  # kernels of linear layers
    config.mesh = {"replica": 1, "fsdp": 1, "tensor": -1}
    return config
