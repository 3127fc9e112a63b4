"""Pretrained weights go from the file to their shards: no process ever holds the model whole."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
from flax import nnx

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn.text_tower import TextConfig

PROGRAM = "tests.sharding.streaming"
CONTEXT, VOCABULARY = 8, 1024
SLACK = 16 * 2**20
"""Memory of the programs themselves: what is compiled and read during the start."""


def write_checkpoint(folder: pathlib.Path) -> None:
    """A CLIP of 260 MB."""
    sizes = {"width": 768, "depth": 8, "heads": 12, "mlp_dim": 3072}
    config = ClipConfig(
        vision=VisionConfig(image_size=32, patch_size=16, **sizes),
        text=TextConfig(vocab_size=VOCABULARY, context=CONTEXT, **{**sizes, "depth": 1}),
        embed_dim=64,
    )
    abstract = nnx.eval_shape(lambda: Clip(config, rngs=nnx.Rngs(params=0)))
    rng = np.random.default_rng(0)
    leaves = {
        path: jnp.asarray(rng.random(leaf.shape, np.float32))
        for path, leaf in flatten(abstract).items()
    }
    processor = Processor(
        image=ImageProcessor(size=32), tokenizer=ClipTokenizer.shipped(VOCABULARY, CONTEXT)
    )
    loaded = Loaded(model=unflatten(abstract, leaves), config=config, processor=processor)
    perception_jax.export(loaded, folder)


def test_two_processes_hold_their_shards_and_one_leaf(tmp_path, root):
    write_checkpoint(tmp_path / "clip")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.sharding.streaming",
                tmp_path / "clip",
                str(port),
                str(k),
            ],
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    for process in processes:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]
        found = json.loads(out.splitlines()[-1])
        assert found["digest"]
        assert 0.5 <= found["own"] / found["whole"] < 0.55  # norms and biases are whole
        assert found["own"] <= found["read"] + SLACK  # the measure sees the weights
        assert found["read"] <= found["own"] + found["largest"] + SLACK
