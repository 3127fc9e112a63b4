"""A CLIP, a task and records small enough for tests."""

from __future__ import annotations

import numpy as np

from perception_jax.api import Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.models.clip.config import ClipConfig, TextConfig, VisionConfig
from perception_jax.systems.contrastive.data import ContrastiveData
from perception_jax.systems.contrastive.task import ContrastiveConfig, ContrastiveTask

SIZE, CONTEXT, VOCAB = 16, 8, 1024
"""Image size, text length and vocabulary size."""
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220), "grey": (90,) * 3}
"""RGB values by colour name."""

CONFIG = ClipConfig(
    vision=VisionConfig(image_size=SIZE, patch_size=8, width=32, depth=2, heads=2, mlp_dim=64),
    text=TextConfig(vocab_size=VOCAB, context=CONTEXT, width=32, depth=1, heads=2, mlp_dim=64),
    embed_dim=16,
)
"""Configuration of the tiny CLIP."""
PROCESSOR = Processor(
    image=ImageProcessor(size=SIZE), tokenizer=ClipTokenizer.shipped(VOCAB, CONTEXT)
)
"""Processor of the tiny CLIP."""


class ColourSource:
    """Noisy images of one colour with its name as caption."""

    def __init__(self, length: int = 64):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng(index)
        name = list(COLOURS)[index % len(COLOURS)]
        noise = rng.integers(-20, 20, (SIZE, SIZE, 3))
        image = np.clip(np.asarray(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        return Record(
            id=f"colour-{index}", images=(image,), captions=(f"{name} number {index % 8}",)
        )


def task(loss: str = "softmax", batch_size: int = 16) -> ContrastiveTask:
    """The contrastive task on `ColourSource`, without a benchmark."""
    return ContrastiveTask(
        ContrastiveConfig(loss=loss),
        CONFIG,
        data=ContrastiveData(ColourSource(), PROCESSOR, batch_size=batch_size, seed=0),
    )
