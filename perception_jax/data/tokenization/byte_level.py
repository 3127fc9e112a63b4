"""Byte-level tokenizers for models that are trained from scratch.

Their chat template is that of `chatml`, without a system text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import tokenizers

from perception_jax.data.tokenization import files
from perception_jax.data.tokenization.bpe import byte_symbols
from perception_jax.data.tokenization.language import LanguageTokenizer
from perception_jax.errors import ConfigError

_END = "<|endoftext|>"
_TURNS = ("<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer() -> LanguageTokenizer:
    """Returns a tokenizer of 259 tokens: 256 bytes, the end of a text, start and end of a turn."""
    return _tokenizer({symbol: k for k, symbol in enumerate(byte_symbols())}, [], words=False)


def learned_tokenizer(texts: Iterable[str], vocab_size: int) -> LanguageTokenizer:
    """Learns a byte-level BPE vocabulary from texts; the same texts give the same one.

    Args:
      vocab_size: most tokens, those of `byte_tokenizer` included. Few texts give fewer.

    Raises:
      ConfigError: a vocabulary without room for all bytes.
    """
    specials = 1 + len(_TURNS)
    if vocab_size < 256 + specials:
        raise ConfigError(
            f"vocab_size: expected at least {256 + specials}, all bytes and {specials} marks, "
            f"found {vocab_size}."
        )
    learned = tokenizers.Tokenizer(tokenizers.models.BPE())
    learned.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - specials,
        min_frequency=2,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(texts, trainer)
    model = json.loads(learned.to_str())["model"]
    return _tokenizer(model["vocab"], model["merges"], words=True)


def _tokenizer(
    vocab: Mapping[str, int], merges: Sequence[Sequence[str]], *, words: bool
) -> LanguageTokenizer:
    """A tokenizer with the marks behind its vocabulary.

    Args:
      words: whether texts are split at words first, which merges never cross.
    """
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    step["use_regex"] = words
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(vocab) + k, "content": text, "special": True, **flags}
        for k, text in enumerate((_END, *_TURNS))
    ]
    vocabulary = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": step,
        "post_processor": None,
        "decoder": step,
        "model": {"type": "BPE", "vocab": dict(vocab), "merges": list(merges)},
    }
    settings = {"eos_token": _END, "chat_template": _TEMPLATE}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    content = {files.VOCABULARY: vocabulary, files.SETTINGS: settings}
    return LanguageTokenizer({k: json.dumps(v).encode() for k, v in content.items()}, "fast")
