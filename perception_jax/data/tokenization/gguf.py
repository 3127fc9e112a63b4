"""The tokenizer inside a GGUF file, as the files of a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from perception_jax.data.tokenization import files
from perception_jax.data.tokenization.files import AddedToken, ForeignVocabularyError
from perception_jax.data.tokenization.language import LanguageTokenizer
from perception_jax.data.tokenization.pipelines import PIECES
from perception_jax.data.tokenization.sentencepiece import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    write_sentencepiece,
)
from perception_jax.data.tokenization.steps import SPLITS
from perception_jax.errors import CheckpointError
from perception_jax.settings import FLAG, Integer, Settings, Text, shown

_PREFIX = "tokenizer.ggml."
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_CLASSES = {"llama": "LlamaTokenizer", "gpt2": "PreTrainedTokenizerFast"}
"""Classes of `transformers` by `tokenizer.ggml.model`."""
_BYTES: Mapping[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_DIGITS = [{"type": "Digits", "individual_digits": True}, _BYTES]
_WORDS: Mapping[str, list[Mapping[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
} | {
    name: [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        },
        {**_BYTES, "use_regex": False},
    ]
    for name, pattern in SPLITS.items()
}
"""How words are split, by `tokenizer.ggml.pre`."""


def from_gguf(metadata: Mapping[str, Any]) -> LanguageTokenizer:
    """The tokenizer of a GGUF file.

    Args:
      metadata: values by key, as Python's own types; only keys of "tokenizer." are read.

    Returns:
      Mode "fast" for a byte-level vocabulary ("gpt2"); "slow_legacy", as llama.cpp encodes, for
      SentencePiece BPE ("llama"). `dataclasses.replace(tokenizer, mode=...)` changes the latter.

    Raises:
      CheckpointError: a key is missing or damaged.
      ForeignVocabularyError: another kind of vocabulary, or words that are split in another way.
    """
    fields = {k.removeprefix(_PREFIX): v for k, v in metadata.items() if k.startswith(_PREFIX)}
    settings = Settings(fields, "GGUF: tokenizer.ggml", error=CheckpointError)
    tokens = _listed(settings, "tokens", str)
    count = len(tokens)
    kinds = _listed(settings, "token_type", int, count)
    kind = settings.get("model", Text(64))
    content: dict[str, bytes] = {}
    if kind == "llama":
        scores = _listed(settings, "scores", float, count)
        prefix = settings.get("add_space_prefix", FLAG, default=True)
        model = SentencePieceModel(
            tuple(zip(tokens, scores, strict=True)),
            kinds,
            dummy_prefix=prefix,
            byte_fallback="<0x00>" in tokens,
        )
        content[PIECES] = write_sentencepiece(model)
    elif kind == "gpt2":
        content[files.VOCABULARY] = json.dumps(_byte_level(settings, tokens, kinds)).encode()
    else:
        raise ForeignVocabularyError(
            f"{settings.where}: model: expected 'llama' or 'gpt2', found {kind!r}."
        )
    named = _named(settings, tokens) | {"tokenizer_class": _CLASSES[kind]}
    if "tokenizer.chat_template" in metadata:
        named["chat_template"] = metadata["tokenizer.chat_template"]
    content[files.SETTINGS] = json.dumps(named).encode()
    return LanguageTokenizer(content, "slow_legacy" if kind == "llama" else "fast")


def _listed(settings: Settings, key: str, kind: type, count: int | None = None) -> tuple[Any, ...]:
    """A list of values of one kind, which is long: the entries are not read one by one."""
    values = settings.content.get(key)
    right = isinstance(values, list) and set(map(type, values)) <= {kind}
    if not right or (count is not None and len(values) != count):
        number = "" if count is None else f"{count} "
        raise CheckpointError(
            f"{settings.where}: {key}: expected a list of {number}values of the type "
            f"{kind.__name__}, found {shown(values)}."
        )
    return tuple(values)


def _named(settings: Settings, tokens: tuple[str, ...]) -> dict[str, Any]:
    """The special tokens and what is added to a text, as in a `tokenizer_config.json`."""
    named: dict[str, Any] = {}
    for name, key in _NAMED.items():
        number = settings.get(key, Integer(0, len(tokens) - 1), default=None)
        if number is not None:
            named[name] = tokens[number]
    for flag in ("add_bos_token", "add_eos_token"):
        if flag in settings:
            named[flag] = settings.get(flag, FLAG)
    return named


def _byte_level(
    settings: Settings, tokens: tuple[str, ...], kinds: tuple[int, ...]
) -> dict[str, Any]:
    """The `tokenizer.json` of a byte-level vocabulary."""
    merges = _listed(settings, "merges", str)
    pre = settings.get("pre", Text(64))
    if pre not in _WORDS:
        raise ForeignVocabularyError(
            f"{settings.where}: pre: expected one of {', '.join(_WORDS)}, found {pre!r}."
        )
    added = [
        {"id": number}
        | AddedToken(token, number, special=kind != USER_DEFINED, normalized=False).flags()
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _WORDS[pre]},
        "decoder": _BYTES,
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": list(merges),
            "ignore_merges": pre == "llama-bpe",
        },
    }
