"""A tokenizer without a vocabulary of its own: every byte of a text is a token."""

from __future__ import annotations

import json

from perception_jax.data.tokenization import files
from perception_jax.data.tokenization.bpe import byte_symbols
from perception_jax.data.tokenization.language import LanguageTokenizer

_END = "<|endoftext|>"
_TURNS = ("<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer() -> LanguageTokenizer:
    """Returns a tokenizer of 259 tokens: 256 bytes, the end of a text, start and end of a turn.

    For models that are trained from scratch. Its chat template is that of `chatml`, without a
    system text.
    """
    symbols = byte_symbols()
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    step["use_regex"] = False
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": len(symbols) + k, "content": text, "special": True, **flags}
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
        "model": {"type": "BPE", "vocab": {s: k for k, s in enumerate(symbols)}, "merges": []},
    }
    settings = {"eos_token": _END, "chat_template": _TEMPLATE}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    content = {files.VOCABULARY: vocabulary, files.SETTINGS: settings}
    return LanguageTokenizer({k: json.dumps(v).encode() for k, v in content.items()}, "fast")
