"""The encoders of MMVP by name: where their weights are and how they process images.

Those of the table in arXiv 2401.06209 (MMVP-VLM), and the DINOv2 with which blind pairs are found.
Anything else that `perception_jax.load` reads is processed as its checkpoint says.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from perception_jax.api import Loaded

_OPENAI = types.MappingProxyType({"mode": "tv_crop", "exif": False, "alpha": "drop_resized"})
"""OpenAI's and open_clip's transform, unless the image is stretched."""
_SQUASH = types.MappingProxyType({"mode": "squash", "exif": False, "alpha": "drop_resized"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublishedEncoder:
    """An encoder.

    Attributes:
      source: of `perception_jax.load`.
      row: of the paper's table (`published.MMVP_VLM`); "" for none.
      image: fields of the checkpoint's `ImageProcessor` that are replaced.
      position_offset: replaces a DINOv2's; see `Dinov2Config`.
    """

    source: str
    row: str = ""
    image: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    position_offset: float | None = None


ENCODERS: Mapping[str, PublishedEncoder] = types.MappingProxyType(
    {
        "openai-l14": PublishedEncoder(
            source="openai/clip-vit-large-patch14", row="OpenAI ViT-L-14 224", image=_OPENAI
        ),
        "openai-l14-336": PublishedEncoder(
            source="openai/clip-vit-large-patch14-336", row="OpenAI ViT-L-14 336", image=_OPENAI
        ),
        "siglip-so14": PublishedEncoder(
            source="timm/ViT-SO400M-14-SigLIP", row="SigLIP ViT-SO-14 224", image=_SQUASH
        ),
        "siglip-so14-384": PublishedEncoder(
            source="timm/ViT-SO400M-14-SigLIP-384", row="SigLIP ViT-SO-14 384", image=_SQUASH
        ),
        "dfn-h14": PublishedEncoder(
            source="apple/DFN5B-CLIP-ViT-H-14", row="DFN ViT-H-14 224", image=_SQUASH
        ),
        "dfn-h14-378": PublishedEncoder(
            source="apple/DFN5B-CLIP-ViT-H-14-378", row="DFN ViT-H-14 378", image=_SQUASH
        ),
        "metaclip-l14": PublishedEncoder(
            source="facebook/metaclip-l14-fullcc2.5b", row="MetaCLIP ViT-L-14 224", image=_OPENAI
        ),
        "metaclip-h14": PublishedEncoder(
            source="facebook/metaclip-h14-fullcc2.5b", row="MetaCLIP ViT-H-14 224", image=_OPENAI
        ),
        "eva01-g14": PublishedEncoder(
            source="timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k",
            row="EVA01 ViT-g-14 224",
            image=_OPENAI,
        ),
        "eva02-e14-plus": PublishedEncoder(
            source="timm/eva02_enormous_patch14_plus_clip_224.laion2b_s9b_b144k",
            row="EVA02 ViT-bigE-14+ 224",
            image=_OPENAI,
        ),
        "dinov2-l14": PublishedEncoder(
            source="facebook/dinov2-large",
            image={**_OPENAI, "size": 224, "resize": 256},
            position_offset=0.1,  # as in the authors' code, whose weights these are
        ),
    }
)
"""Encoders by name. Which weights the paper used for MetaCLIP and EVA is inferred from its numbers
of parameters; that DFN stretches images is open_clip's present setting."""

PAPER = tuple(name for name, one in ENCODERS.items() if one.row)
"""Names of the encoders of the paper's table, in its order."""


def encoder_of(text: str) -> PublishedEncoder:
    """The encoder that a flag means: a name, `NAME=SOURCE` for its weights at another place, or any
    source."""
    name, mark, source = text.partition("=")
    if name not in ENCODERS:
        return PublishedEncoder(source=text)
    return dataclasses.replace(ENCODERS[name], source=source) if mark else ENCODERS[name]


def open_encoder(text: str, mesh: Mesh | None = None) -> Loaded:
    """Loads the encoder that a flag means in float32, with its own image processor.

    Raises:
      CheckpointError, ConfigError: as of `perception_jax.load`.
      ConfigError: a model that takes no images.
    """
    import perception_jax
    from perception_jax.errors import ConfigError

    encoder = encoder_of(text)
    loaded = perception_jax.load(encoder.source, dtype="float32", mesh=mesh)
    image = loaded.processor.image
    if image is None or not image.is_square:
        raise ConfigError(
            f"{encoder.source}: expected an image encoder whose processor makes images of one size."
        )
    if encoder.position_offset is not None:
        loaded.model.position_offset = encoder.position_offset
    processor = dataclasses.replace(
        loaded.processor, image=dataclasses.replace(image, **encoder.image)
    )
    return dataclasses.replace(loaded, processor=processor)
