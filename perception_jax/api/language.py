"""Language models to train or to plan: by name, described by their files, or drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from flax import nnx

from perception_jax.api.loaded import Loaded, Processor
from perception_jax.api.loading import describe
from perception_jax.api.locate import find
from perception_jax.data.tokenization import LanguageTokenizer, byte_tokenizer, read_tokenizer
from perception_jax.errors import CheckpointError, ConfigError, did_you_mean
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.registry import architecture_of

BYTES = "bytes"
"""Name of the tokenizer `data.tokenization.byte_tokenizer`."""

_SIZES = ("vicuna_7b", "vicuna_13b", "smollm2_135m", "smollm2_360m", "smollm2_1_7b")
_PUBLISHED = {
    "lmsys/vicuna-7b-v1.5": "vicuna_7b",
    "lmsys/vicuna-13b-v1.5": "vicuna_13b",
    "HuggingFaceTB/SmolLM2-135M": "smollm2_135m",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2_135m",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "smollm2_360m",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "smollm2_1_7b",
}
"""Sizes by hub id of models that are planned without a connection."""


def language_config(source: str) -> LlamaConfig:
    """Configuration of a published size or model without a connection, or of a checkpoint.

    Raises:
      ConfigError: neither, or a model that does not generate text.
    """
    size = _PUBLISHED.get(source, source)
    if size in _SIZES:
        return getattr(LlamaConfig, size)()
    try:
        config = describe(source)[0]
    except CheckpointError as error:
        hint = did_you_mean(source, _SIZES)
        raise ConfigError(f"model: {error} Published sizes: {', '.join(_SIZES)}{hint}") from error
    if not isinstance(config, LlamaConfig):
        raise ConfigError(f"model: expected a language model, found {type(config).__name__}.")
    return config


def describe_language(
    source: str | os.PathLike[str],
) -> tuple[LlamaConfig, LanguageTokenizer]:
    """Configuration and tokenizer of a checkpoint; of a hub id only settings are fetched.

    Raises:
      CheckpointError: as `perception_jax.load`.
      ConfigError: another kind of model, or one without tokenizer.
    """
    model, processor = describe(source)
    if not isinstance(model, LlamaConfig) or not isinstance(processor.tokenizer, LanguageTokenizer):
        raise ConfigError(
            f"model: expected a language model with its tokenizer, found {source} with "
            f"{type(model).__name__} and {type(processor.tokenizer).__name__}."
        )
    return model, processor.tokenizer


def drawn_language(
    sizes: Mapping[str, Any], tokenizer: str | LanguageTokenizer
) -> tuple[LlamaConfig, LanguageTokenizer]:
    """Configuration and tokenizer of a language model whose weights are drawn.

    Args:
      sizes: fields of `LlamaConfig`; special tokens are those of the tokenizer.
      tokenizer: itself, `BYTES`, or a folder or hub id.
    """
    found = tokenizer
    if not isinstance(found, LanguageTokenizer):
        found = byte_tokenizer() if tokenizer == BYTES else read_tokenizer(find(tokenizer))
    special = {name: getattr(found, name) for name in ("start_id", "end_ids", "pad_id")}
    return LlamaConfig(**sizes, **special), found


def without_weights(config: Any, processor: Processor, *, name: str = "") -> Loaded:
    """A model of shapes alone."""
    build = architecture_of(config).build
    model = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(params=0)))
    return Loaded(model=model, config=config, processor=processor, name=name)
