"""A LLaVA with one or two image towers, small enough for tests."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import nnx

from perception_jax.api import Loaded, Processor
from perception_jax.data.processors import ImageProcessor
from perception_jax.models.clip.config import VisionConfig
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.llava.architecture import ARCHITECTURES
from perception_jax.models.llava.config import LlavaConfig
from perception_jax.models.llava.modeling import Llava
from perception_jax.models.towers import TowerConfig
from perception_jax.testing import tiny_llama

CLIP = TowerConfig(
    vision=VisionConfig(image_size=24, patch_size=8, width=24, depth=3, heads=2, mlp_dim=40)
)
"""Configuration of the first image tower, 3×3 patches."""
DINOV2 = Dinov2Config(
    image_size=40, patch_size=8, width=64, depth=2, heads=1, mlp_dim=128, position_offset=0.1
)
"""Configuration of the second image tower, of another width, with 5×5 stored positions."""
CONFIG = LlavaConfig(
    language=dataclasses.replace(tiny_llama.CONFIG, vocab_size=276),
    towers=(CLIP,),
    image_aspect="pad",
)
"""Configuration of the tiny LLaVA with one image tower."""
IMOF = dataclasses.replace(CONFIG, towers=(CLIP, DINOV2), mixing="interleaved")
"""Configuration of the tiny LLaVA with interleaved features."""
AMOF = dataclasses.replace(
    CONFIG,
    towers=(CLIP, dataclasses.replace(DINOV2, width=24, heads=2, mlp_dim=96)),
    mixing="additive",
    mixing_ratio=0.25,
)
"""Configuration of the tiny LLaVA with added features."""


def loaded(config: LlavaConfig = CONFIG, *, context: int = 256, seed: int = 0) -> Loaded:
    """A tiny LLaVA with random weights and its processor, as `perception_jax.load` gives.

    Args:
      config: of towers and mixing; the language model becomes that of `tiny_llama.loaded`.
      context: most tokens of a text.
    """
    words = tiny_llama.tokenizer(chat=False)
    language = dataclasses.replace(config.language, vocab_size=words.vocab_size, context=context)
    config = dataclasses.replace(config, language=language)
    model = jax.jit(lambda: Llava(config, rngs=nnx.Rngs(params=seed)))()
    return Loaded(
        model=model,
        config=config,
        processor=Processor(image=processor(config), tokenizer=words),
        name="tiny LLaVA",
    )


def processor(config: LlavaConfig) -> ImageProcessor:
    """The image processor of the authors' code for a configuration."""
    settings: dict[str, Any] = ARCHITECTURES[0].image_settings(config, "reference")
    return ImageProcessor(**settings)
