"""Llama's checkpoints: Hugging Face folders both ways, GGUF files in."""

from __future__ import annotations

from typing import Any

from perception_jax.data.tokenization import (
    ForeignVocabularyError,
    LanguageTokenizer,
    from_gguf,
    read_tokenizer,
)
from perception_jax.models.architecture import Architecture, Claim, Files
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.llama.params import TABLES


def read_tokenizer_files(files: Files, _: Any) -> LanguageTokenizer | None:
    """Reads the tokenizer of a folder, or that inside a GGUF file; None if there is none, or one
    with another kind of vocabulary.

    Its ids are not compared with the embedding table: published folders name a padding token that
    their table lacks.

    Raises:
      CheckpointError: damaged files.
    """
    try:
        if files.layout == "gguf":
            return from_gguf(files.settings) if "tokenizer.ggml.model" in files.settings else None
        folder = files.folder_with("tokenizer.json", "tokenizer.model")
        return None if folder is None else read_tokenizer(folder)
    except ForeignVocabularyError:
        return None


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
        read_tokenizer=read_tokenizer_files,
    ),
)
"""The architectures of this module; see `models.registry`."""
