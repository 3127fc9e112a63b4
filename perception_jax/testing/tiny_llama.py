"""A language model small enough for tests."""

from __future__ import annotations

import dataclasses
import json

import jax
from flax import nnx

from perception_jax.api import Loaded, Processor
from perception_jax.data.tokenization import LanguageTokenizer
from perception_jax.data.tokenization.sentencepiece import write_sentencepiece
from perception_jax.models.llama.config import LlamaConfig
from perception_jax.models.llama.modeling import Llama
from perception_jax.testing.tiny_llama_vocabulary import MODEL

CONFIG = LlamaConfig(
    vocab_size=96,
    context=64,
    width=32,
    depth=3,
    heads=4,
    kv_heads=2,
    head_width=8,
    mlp_dim=48,
    start_id=1,
    end_ids=(2,),
    pad_id=0,
)
"""Configuration of the tiny Llama: grouped queries, a head of its own."""
_CHAT = ("<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n'}}{% endfor %}{{ '<|im_start|>assistant\\n' }}"
)


def tokenizer(*, chat: bool = True) -> LanguageTokenizer:
    """The tokenizer of a hand-made vocabulary of 276 tokens.

    Args:
      chat: whether its files hold a chat template, that of `chatml` without a system text.
    """
    count = len(MODEL.pieces)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    files = {
        "tokenizer.model": write_sentencepiece(MODEL),
        "added_tokens.json": {token: count + k for k, token in enumerate(_CHAT)},
        "tokenizer_config.json": settings | ({"chat_template": _CHAT_TEMPLATE} if chat else {}),
        "generation_config.json": {"eos_token_id": [2, count + 1]},
    }
    content = {k: v if isinstance(v, bytes) else json.dumps(v).encode() for k, v in files.items()}
    return LanguageTokenizer(content, "slow_legacy")


def loaded(*, context: int = 256, chat: bool = True, seed: int = 0) -> Loaded:
    """A tiny Llama with random weights and its tokenizer, as `perception_jax.load` gives.

    Args:
      context: most tokens of a text.
      chat: as of `tokenizer`.
    """
    words = tokenizer(chat=chat)
    config = dataclasses.replace(CONFIG, vocab_size=words.vocab_size, context=context)
    model = jax.jit(lambda: Llama(config, rngs=nnx.Rngs(params=seed)))()
    processor = Processor(image=None, tokenizer=words)
    return Loaded(model=model, config=config, processor=processor, name="tiny Llama")
