"""What GiVE stands on: an image tower and a text tower in one space, or one of each to be joined.

CLIP, SigLIP and EVA-CLIP have both. A vision-only encoder (DINOv2) is paired with the text tower of
a CLIP; the projection into its space is then trained (`Give.visual_proj`).
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from perception_jax import api
from perception_jax.data.processors import Mode
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.data.views import at_size
from perception_jax.errors import ConfigError
from perception_jax.interop.load import load_params
from perception_jax.interop.source import open_source
from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.clip.params import text_table
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture_of
from perception_jax.models.shardings import SHARDINGS
from perception_jax.models.siglip.config import SiglipConfig
from perception_jax.nn.text_tower import TextConfig, TextTower
from perception_jax.shard.rules import shardings as make_shardings

PUBLISHED = {
    "openai/clip-vit-base-patch32": ClipConfig.vit_b32,
    "openai/clip-vit-base-patch16": ClipConfig.vit_b16,
    "openai/clip-vit-large-patch14": ClipConfig.vit_l14,
    "openai/clip-vit-large-patch14-336": ClipConfig.vit_l14_336,
    "google/siglip-so400m-patch14-384": SiglipConfig.so400m_384,
}
"""Configurations by hub id."""
TEXT_SOURCE = "openai/clip-vit-large-patch14"
"""The text tower of a vision-only encoder."""


@runtime_checkable
class Backbone(Protocol):
    """A module with an image tower, a text tower and a temperature (stored as a logarithm)."""

    vision: nnx.Module
    text: TextTower
    logit_scale: nnx.Param


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedConfig:
    """A vision-only encoder and the text tower it is paired with."""

    vision: Dinov2Config
    text: TextConfig
    embed_dim: int


class Paired(nnx.Module):
    """A vision-only encoder beside a CLIP's text tower: no joint space yet."""

    def __init__(self, config: PairedConfig, *, rngs: nnx.Rngs):
        self.vision = Dinov2(config.vision, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.zeros(()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedBackbone:
    """Attributes:
    name: what it was loaded from; stands in the checkpoints of adapters made for it.
    model: a `Backbone`.
    config: of the model: `ClipConfig`, `SiglipConfig`, `EvaConfig` or `PairedConfig`.
    processor: of images for the image tower, of texts for the text tower.
    """

    name: str
    model: nnx.Module
    config: Any
    processor: api.Processor

    def at_size(self, size: int, *, mode: Mode | None = None) -> LoadedBackbone:
        """The same with a processor that makes images of another size; towers take any.

        Args:
          mode: how images become squares; None keeps the processor's.
        """
        image = at_size(self.processor.image, size)
        if mode not in (None, image.mode):
            image = dataclasses.replace(image, mode=mode, resize=None)
        processor = dataclasses.replace(self.processor, image=image)
        return dataclasses.replace(self, processor=processor)


def load_backbone(
    source: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str] = TEXT_SOURCE,
    dtype: np.typing.DTypeLike | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> LoadedBackbone:
    """Loads a backbone as `perception_jax.load` does.

    Args:
      text: for a vision-only `source`, the CLIP whose text tower it gets; its image tower may be
        missing and is not read.

    Raises:
      CheckpointError, ConfigError: as `perception_jax.load`; or the encoder has no text tower and
        is none that can be paired.
    """
    loaded = api.load(source, dtype=dtype, mesh=mesh)
    name = os.fspath(source)
    if hasattr(loaded.model, "text"):
        return as_backbone(loaded, name)
    if not isinstance(loaded.config, Dinov2Config):
        raise ConfigError(
            f"{name} is an image tower alone, without the text tower that its space is shared "
            "with; load the whole model, or a DINOv2."
        )
    return _paired(name, loaded, text, dtype, mesh)


def as_backbone(loaded: api.Loaded, name: str = "") -> LoadedBackbone:
    """A checkpoint with both towers, already loaded."""
    return LoadedBackbone(
        name=name, model=loaded.model, config=loaded.config, processor=loaded.processor
    )


def published_backbone(name: str) -> LoadedBackbone:
    """A published backbone by shape alone, without its weights: to compile for before anyone
    downloads or pays. It has no tokenizer.

    Raises:
      ConfigError: a name that is not among `PUBLISHED`.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"expected one of {', '.join(PUBLISHED)}, found {name!r}.")
    config = PUBLISHED[name]()
    model = nnx.eval_shape(lambda: build_backbone(config, rngs=nnx.Rngs(params=0)))
    image = architecture_of(config).image_processor(config, "hf")
    processor = api.Processor(image=image, tokenizer=None)
    return LoadedBackbone(name=name, model=model, config=config, processor=processor)


def build_backbone(config: Any, *, rngs: nnx.Rngs) -> nnx.Module:
    """A backbone with fresh parameters, to be shaped by or filled from a checkpoint."""
    if isinstance(config, PairedConfig):
        return Paired(config, rngs=rngs)
    return architecture_of(config).build(config, rngs=rngs)


def is_joint(backbone: Backbone) -> bool:
    """Whether image and text embeddings live in one space."""
    return not isinstance(backbone, Paired)


def joint_width(backbone: Backbone) -> int:
    """Width of the space of text embeddings."""
    return backbone.text.projection.kernel.shape[1]


def leaves_in_give(backbone: nnx.Module) -> dict[str, Array]:
    """A backbone's leaves by the paths that they have in a `Give`."""
    return {_path_in_give(path): leaf for path, leaf in flatten(backbone).items()}


def _path_in_give(path: str) -> str:
    inside = path.removeprefix("vision/blocks/")
    return f"backbone/{path}" if inside == path else f"backbone/vision/blocks/base/{inside}"


def _paired(
    name: str,
    vision: api.Loaded,
    text: str | os.PathLike[str],
    dtype: np.typing.DTypeLike | None,
    mesh: jax.sharding.Mesh | None,
) -> LoadedBackbone:
    found = open_source(api.find(text))
    clip = ClipConfig.from_hf(found.settings)
    config = PairedConfig(vision=vision.config, text=clip.text, embed_dim=clip.embed_dim)
    paired = nnx.eval_shape(lambda: Paired(config, rngs=nnx.Rngs(params=0)))
    abstract = {
        path: leaf for path, leaf in flatten(paired).items() if not path.startswith("vision/")
    }
    placed = None if mesh is None else make_shardings(abstract, SHARDINGS, mesh)
    params = load_params(text_table(), found.files, abstract, dtype=dtype, shardings=placed).params
    params |= {f"vision/{path}": leaf for path, leaf in flatten(vision.model).items()}
    context = clip.text.context
    folder = next((f for f in found.folders if (f / "vocab.json").is_file()), None)
    tokenizer = (
        ClipTokenizer.shipped(context=context)
        if folder is None
        else ClipTokenizer.from_directory(folder, context)
    )
    return LoadedBackbone(
        name=name,
        model=unflatten(paired, params),
        config=config,
        processor=api.Processor(image=vision.processor.image, tokenizer=tokenizer),
    )
