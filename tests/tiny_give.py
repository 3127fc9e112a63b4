"""A tiny CLIP on disk with random GiVE adapters that change what it sees."""

from __future__ import annotations

import pathlib

from flax import nnx

import perception_jax
from perception_jax.api import Loaded, Processor, load_backbone
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn.adapters import AdapterParam
from perception_jax.nn.text_tower import TextConfig
from perception_jax.systems.give.adapter import AdapterConfig
from perception_jax.systems.give.checkpoint import save_give
from perception_jax.systems.give.model import Give, GiveConfig, leaves_in_give
from perception_jax.systems.give.pretrained import ADAPTERS_FILE
from tests.arrays import drawn

SIDE, PATCH, WIDTH, DEPTH = 16, 8, 32, 3
VOCAB, CONTEXT = 600, 12
LAYERS = (0, 2)
"""Blocks with an adapter."""


def tiny_clip(width: int = WIDTH) -> Loaded:
    sizes = {"width": width, "depth": DEPTH, "heads": 2, "mlp_dim": 48}
    config = ClipConfig(
        vision=VisionConfig(image_size=SIDE, patch_size=PATCH, **sizes),
        text=TextConfig(vocab_size=VOCAB, context=CONTEXT, width=24, depth=1, heads=2, mlp_dim=48),
        embed_dim=12,
    )
    processor = Processor(
        image=ImageProcessor(size=SIDE), tokenizer=ClipTokenizer.shipped(VOCAB, CONTEXT)
    )
    model = drawn(lambda: Clip(config, rngs=nnx.Rngs(params=0)))
    return Loaded(model=model, config=config, processor=processor)


def with_adapters(loaded: Loaded, config: GiveConfig) -> Give:
    """Random adapters and heads in a backbone."""
    own = leaves_in_give(loaded.model)
    give = drawn(lambda: Give(config, loaded.model, rngs=nnx.Rngs(params=0)), 1)
    return unflatten(give, own | flatten(give, AdapterParam))


def write(root: pathlib.Path, *, dense: bool = False) -> pathlib.Path:
    """`root/backbone`, and adapters for it in `root`, whose file is returned."""
    perception_jax.export(tiny_clip(), root / "backbone")
    config = GiveConfig(layers=LAYERS, adapter=AdapterConfig(heads=4), dense=dense)
    backbone = load_backbone(root / "backbone")
    save_give(root / ADAPTERS_FILE, with_adapters(backbone, config), backbone, variant="tiny")
    return root / ADAPTERS_FILE
