"""Llama's checkpoints: Hugging Face folders both ways, GGUF files in."""

from __future__ import annotations

from perception_jax.models.architecture import Architecture, Claim
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.llama.params import TABLES

ARCHITECTURES = (
    Architecture(
        name="llama",
        build=Llama,
        owns=lambda config: isinstance(config, LlamaConfig),
        read_config={"hf": LlamaConfig.from_hf, "gguf": LlamaConfig.from_gguf},
        write_config={"hf": LlamaConfig.to_hf},
        tables=TABLES,
        claims={
            "gguf": Claim(
                lambda settings: settings.get("general.architecture") == "llama",
                "general.architecture 'llama'",
            )
        },
        complete=lambda config, _, shapes: config.with_tensors(shapes),
    ),
)
"""The architectures of this module; see `models.registry`."""
