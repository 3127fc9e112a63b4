"""What GiVE stands on: an image tower and a text tower in one space, or one of each to be joined.

CLIP, SigLIP and EVA-CLIP have both. A vision-only encoder (DINOv2) is paired with the text tower of
a CLIP; the projection into its space is then trained (`Give.visual_proj`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from perception_jax import api
from perception_jax.data.processors import Mode
from perception_jax.data.views import at_size
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.interop.dtypes import floating_dtype
from perception_jax.interop.load import LoadedParams, load_params
from perception_jax.interop.source import open_source
from perception_jax.models.architecture import Files
from perception_jax.models.clip.architecture import read_tokenizer
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


VISION = "vision/"
"""Where the image tower's leaves are."""


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


@runtime_checkable
class WeightSource(Protocol):
    """Reads leaves from files, e.g. an `api.Prepared`."""

    def read(
        self,
        *,
        dtype: np.dtype | None = None,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        targets: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    ) -> LoadedParams:
        """See `interop.load.load_params`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedBackbone:
    """Attributes:
    name: what it was loaded from; stands in the checkpoints of adapters made for it.
    model: a `Backbone`; its leaves are shapes if the weights have not been read.
    config: of the model: `ClipConfig`, `SiglipConfig`, `EvaConfig` or `PairedConfig`.
    processor: of images for the image tower, of texts for the text tower.
    source: what reads the weights, where `model` has none yet.
    """

    name: str
    model: nnx.Module
    config: Any
    processor: api.Processor
    source: WeightSource | None = None

    def read(self, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Some leaves by path, with the dtype and sharding of their targets: from `source`, or
        copies of those of `model`.

        Raises:
          CheckpointError: the files do not fit, or there are no weights.
        """
        if self.source is not None:
            return self.source.read(targets=targets).params
        leaves = flatten(self.model)
        if not all(isinstance(leaf, jax.Array) for leaf in leaves.values()):
            raise CheckpointError(f"{self.name}: expected weights, found shapes alone.")

        def copied() -> dict[str, Array]:
            return {
                path: jnp.copy(leaves[path].astype(target.dtype))
                for path, target in targets.items()
            }

        placed = {path: target.sharding for path, target in targets.items()}
        return jax.jit(copied, out_shardings=placed)()

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
    opened = open_backbone(source, text=text)
    leaves = flatten(opened.model)
    placed = None if mesh is None else make_shardings(leaves, SHARDINGS, mesh)
    wanted = None if dtype is None else floating_dtype(dtype)
    params = opened.source.read(dtype=wanted, shardings=placed).params
    return dataclasses.replace(opened, model=unflatten(opened.model, params), source=None)


def open_backbone(
    source: str | os.PathLike[str], *, text: str | os.PathLike[str] = TEXT_SOURCE
) -> LoadedBackbone:
    """A backbone whose weights are read later, straight to where they are needed.

    Args, Raises: as of `load_backbone`.
    """
    prepared = api.prepare(source)
    name = os.fspath(source)
    if hasattr(prepared.model, "text"):
        return LoadedBackbone(
            name=name,
            model=prepared.model,
            config=prepared.config,
            processor=prepared.processor,
            source=prepared,
        )
    if not isinstance(prepared.config, Dinov2Config):
        raise ConfigError(
            f"{name} is an image tower alone, without the text tower that its space is shared "
            "with; load the whole model, or a DINOv2."
        )
    return _paired(name, prepared, text)


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


def paths_in_give(backbone: nnx.Module) -> dict[str, str]:
    """For each of a backbone's paths, the one that its leaf has in a `Give`."""
    return {path: _path_in_give(path) for path in flatten(backbone)}


def leaves_in_give(backbone: nnx.Module) -> dict[str, Array]:
    """A backbone's leaves by the paths that they have in a `Give`."""
    return {_path_in_give(path): leaf for path, leaf in flatten(backbone).items()}


def _path_in_give(path: str) -> str:
    inside = path.removeprefix("vision/blocks/")
    return f"backbone/{path}" if inside == path else f"backbone/vision/blocks/base/{inside}"


def _paired(name: str, vision: api.Prepared, text: str | os.PathLike[str]) -> LoadedBackbone:
    found = open_source(api.find(text))
    clip = ClipConfig.from_hf(found.settings)
    config = PairedConfig(vision=vision.config, text=clip.text, embed_dim=clip.embed_dim)
    paired = nnx.eval_shape(lambda: Paired(config, rngs=nnx.Rngs(params=0)))
    tokenizer = read_tokenizer(
        Files(folders=found.folders, settings=found.settings, layout="hf"), clip
    )
    return LoadedBackbone(
        name=name,
        model=paired,
        config=config,
        processor=api.Processor(image=vision.processor.image, tokenizer=tokenizer),
        source=_PairedSource(vision=vision, text=found.files, leaves=flatten(paired)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PairedSource:
    """The weights of a vision-only encoder and of a CLIP's text tower; see `WeightSource`."""

    vision: api.Prepared
    text: Mapping[str, np.ndarray]
    leaves: Mapping[str, jax.ShapeDtypeStruct]

    def read(
        self,
        *,
        dtype: np.dtype | None = None,
        shardings: Mapping[str, jax.sharding.Sharding] | None = None,
        targets: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    ) -> LoadedParams:
        def of_vision(leaves: Mapping[str, Any] | None) -> dict[str, Any] | None:
            return None if leaves is None else _without(VISION, leaves)

        def of_text(leaves: Mapping[str, Any] | None) -> dict[str, Any] | None:
            if leaves is None:
                return None
            return {path: x for path, x in leaves.items() if not path.startswith(VISION)}

        vision = self.vision.read(
            dtype=dtype, shardings=of_vision(shardings), targets=of_vision(targets)
        )
        text = load_params(
            text_table(),
            self.text,
            of_text(self.leaves),
            dtype=dtype,
            shardings=of_text(shardings),
            targets=of_text(targets),
        )
        params = text.params | {f"{VISION}{path}": leaf for path, leaf in vision.params.items()}
        return LoadedParams(params, text.report)


def _without(prefix: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves below a prefix, by the rest of their paths."""
    return {p.removeprefix(prefix): x for p, x in leaves.items() if p.startswith(prefix)}
