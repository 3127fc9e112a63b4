"""Backbones for methods that need an image tower and a text tower: loaded, opened, or by shape.

CLIP, SigLIP and EVA-CLIP have both towers. A vision-only encoder (DINOv2) is paired with the text
tower of a CLIP; see `models.paired`.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np
from flax import nnx

from perception_jax.api.joined import JoinedWeights, TableWeights
from perception_jax.api.loaded import Loaded, Processor
from perception_jax.api.loading import describe, prepare
from perception_jax.api.locate import find
from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError
from perception_jax.interop.checkpoint_source import open_source
from perception_jax.models.architecture import Files
from perception_jax.models.clip.architecture import read_tokenizer
from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.params import text_table
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.paired import Backbone, Paired, PairedConfig, build_backbone
from perception_jax.models.params import flatten
from perception_jax.models.registry import architecture_of
from perception_jax.models.shardings import SHARDINGS
from perception_jax.models.siglip.config import SiglipConfig

PUBLISHED = {
    "openai/clip-vit-base-patch32": ClipConfig.vit_b32,
    "openai/clip-vit-base-patch16": ClipConfig.vit_b16,
    "openai/clip-vit-large-patch14": ClipConfig.vit_l14,
    "openai/clip-vit-large-patch14-336": ClipConfig.vit_l14_336,
    "google/siglip-so400m-patch14-384": SiglipConfig.so400m_384,
}
"""Configurations of published backbones by hub id."""
TEXT_SOURCE = "openai/clip-vit-large-patch14"
"""Default checkpoint of the text tower for a vision-only encoder."""

_VISION = "vision/"
"""Path prefix of the image tower's leaves."""


def load_backbone(
    source: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] = TEXT_SOURCE,
    dtype: np.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Loaded:
    """Loads a backbone as `perception_jax.load` does.

    Args:
      source, dtype, mesh: as of `perception_jax.load`.
      text: for a vision-only `source`, the CLIP whose text tower it gets; its image tower may be
        missing and is not read.

    Raises:
      CheckpointError, ConfigError: as `perception_jax.load`; or the encoder has no text tower and
        is none that can be paired.
    """
    return open_backbone(source, text=text).load_weights(dtype=dtype, mesh=mesh)


def open_backbone(
    source: str | os.PathLike[str], *, text: str | os.PathLike[str] = TEXT_SOURCE
) -> Loaded:
    """Opens a backbone without reading its weights, which can later be read straight to their
    shards.

    Args, Raises: as of `load_backbone`.
    """
    opened = prepare(source)
    if isinstance(opened.config, Dinov2Config):
        return _paired(opened, text)
    if not isinstance(opened.model, Backbone):
        raise ConfigError(
            f"{opened.name} is an image tower alone, without the text tower that its space is "
            "shared with; load the whole model, or a DINOv2."
        )
    return opened


def backbone_processor(
    source: str | os.PathLike[str], *, text: str | os.PathLike[str] = TEXT_SOURCE
) -> Processor:
    """Reads the processor of a backbone, and no weights; of a hub id only settings are fetched.

    Args, Raises: as of `load_backbone`.
    """
    config, processor = describe(source)
    if isinstance(config, Dinov2Config):
        return dataclasses.replace(processor, tokenizer=describe(text)[1].tokenizer)
    # Without a tokenizer it may be an image tower alone, which is an error.
    return open_backbone(source, text=text).processor if processor.tokenizer is None else processor


def published_backbone(name: str) -> Loaded:
    """Builds a published backbone without weights and tokenizer, from shapes alone.

    Raises:
      ConfigError: a name that is not among `PUBLISHED`.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"expected one of {', '.join(PUBLISHED)}, found {name!r}.")
    config = PUBLISHED[name]()
    model = nnx.eval_shape(lambda: build_backbone(config, rngs=nnx.Rngs(params=0)))
    image = ImageProcessor(**architecture_of(config).image_settings(config, "hf"))
    processor = Processor(image=image, tokenizer=None)
    return Loaded(name=name, model=model, config=config, processor=processor)


def _paired(vision: Loaded, text: str | os.PathLike[str]) -> Loaded:
    found = open_source(find(text))
    clip = ClipConfig.from_hf(found.settings)
    config = PairedConfig(vision=vision.config, text=clip.text, embed_dim=clip.embed_dim)
    paired = nnx.eval_shape(lambda: Paired(config, rngs=nnx.Rngs(params=0)))
    tokenizer = read_tokenizer(
        Files(folders=found.folders, settings=found.settings, layout="hf"), clip
    )
    leaves = {path: x for path, x in flatten(paired).items() if not path.startswith(_VISION)}
    words = TableWeights(table=text_table(), files=found.files, leaves=leaves)
    return Loaded(
        name=vision.name,
        model=paired,
        config=config,
        processor=Processor(image=vision.processor.image, tokenizer=tokenizer),
        weights=JoinedWeights(parts={_VISION: vision.weights, "": words}, rules=SHARDINGS),
    )
