"""Serving of a language model: what `launch.plan` compiles.

    python -m launch.plan --config=configs/text/serve.py:vicuna_7b --slice=v5e-4,v5e-8
    python -m launch.plan --config=configs/text/serve.py:vicuna_13b --config.int8=True --slice=v5e-1

The argument is the model: a published size of `LlamaConfig`, or a folder or hub id, of which only
the settings are read.
"""

from __future__ import annotations

import ml_collections


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """One text at a time, split over all chips."""
    config = ml_collections.ConfigDict()
    config.system = "text"
    config.model = arg or "vicuna_7b"
    config.batch_size = 1
    config.prompt = 1024  # tokens of the prefill: the length of a bucket
    config.context = 2048  # tokens that the cache has room for
    config.dtype = "bfloat16"  # of weights and cache
    config.int8 = False  # kernels of linear layers
    config.mesh = {"replica": 1, "fsdp": 1, "tensor": -1}
    return config
