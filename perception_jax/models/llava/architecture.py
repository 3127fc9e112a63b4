"""LLaVA's checkpoints: llava-hf's and the authors', those with two image towers among them."""

from __future__ import annotations

from typing import Any

from jax.sharding import PartitionSpec as P

from perception_jax.models import registry
from perception_jax.models.architecture import Architecture
from perception_jax.models.llama.architecture import read_tokenizer_files
from perception_jax.models.llava import formats
from perception_jax.models.llava.config import LlavaConfig
from perception_jax.models.llava.modeling import Llava
from perception_jax.models.llava.params import TABLES
from perception_jax.models.shardings import SHARDINGS


def _image_settings(config: LlavaConfig, layout: str) -> dict[str, Any]:
    """The authors' code opens images without EXIF's orientation and drops transparency."""
    tower = config.towers[0]
    usual = registry.architecture_of(tower).image_settings(tower, "hf")
    mode = "llava_pad" if config.image_aspect == "pad" else "hf_crop"
    own = {"size": config.image_size, "mode": mode, "resize": None}
    return usual | own | ({"exif": False, "alpha": "drop"} if layout == "reference" else {})


ARCHITECTURES = (
    Architecture(
        name="llava",
        model_types=("llava_llama",),
        build=Llava,
        owns=lambda config: isinstance(config, LlavaConfig),
        read_config={
            "hf": formats.from_hf,
            "reference": formats.from_reference,
            "jax": formats.from_jax,
        },
        write_config={
            "hf": formats.to_hf,
            "reference": formats.to_reference,
            "jax": formats.to_jax,
        },
        tables=TABLES,
        layout_of=lambda content, shapes: (
            "reference" if formats.is_reference(content, shapes) else "hf"
        ),
        elsewhere=formats.elsewhere,
        complete=lambda config, _, shapes: formats.complete(config, shapes),
        image_settings=_image_settings,
        read_tokenizer=read_tokenizer_files,
        shardings=(
            (r"projector/fc1/kernel$", P("fsdp", "tensor")),
            (r"projector/fc\d+/kernel$", P("tensor", "fsdp")),
            *SHARDINGS,
        ),
    ),
)
"""The architectures of this module; see `models.registry`."""
