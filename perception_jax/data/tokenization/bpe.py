"""Byte-pair encoding (Sennrich et al., arXiv 1508.07909) on the `tokenizers` package.

A SentencePiece BPE model merges the pair whose joined piece has the best score; `tokenizers` takes
an ordered list of pairs. The list that orders pairs by that score gives SentencePiece's ids (tests:
Llama's and Mistral's vocabularies and small trained ones), except with pieces that a user defined,
which are refused.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, models

from perception_jax.data.tokenization import files, steps
from perception_jax.data.tokenization.files import ForeignVocabularyError
from perception_jax.data.tokenization.sentencepiece import (
    BYTE,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)
from perception_jax.errors import CheckpointError
from perception_jax.settings import FLAG, Optional, Settings, Text, shown

_MAX_TOKENS, _MAX_TOKEN = 1 << 20, 1024
"""Tokens of a vocabulary, characters of one."""


def pair(line: str) -> tuple[str, str]:
    """The two tokens of a line of `merges.txt`."""
    left, _, right = line.partition(" ")
    return left, right


def read_merges(model: Settings) -> list[tuple[str, str]]:
    """The merges of a BPE model of a `tokenizer.json`, in order of priority.

    Raises:
      CheckpointError: no list of pairs of tokens.
    """
    pairs = model.content.get("merges")
    if not isinstance(pairs, list):
        raise CheckpointError(f"{model.where}: merges: expected a list, found {shown(pairs)}.")
    merges = [pair(item) if isinstance(item, str) else item for item in pairs]
    for index, item in enumerate(merges):
        strings = isinstance(item, list | tuple) and all(isinstance(x, str) for x in item)
        if not strings or len(item) != 2:
            raise CheckpointError(
                f"{model.where}: merges[{index}]: expected two tokens, found {shown(item)}."
            )
    return [(left, right) for left, right in merges]


def byte_symbols() -> list[str]:
    """A printable character for each byte, in the order of GPT-2's and CLIP's vocabularies.

    Printable Latin-1 bytes stand for themselves and come first; the others follow, in order, as the
    characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]


@functools.cache
def byte_values() -> Mapping[str, int]:
    """The byte that each of `byte_symbols` stands for."""
    symbols = byte_symbols()
    order = [ord(symbol) for symbol in symbols if ord(symbol) < 256]
    order += sorted(set(range(256)) - set(order))
    return dict(zip(symbols, order, strict=True))


def from_json(content: Settings, added: Sequence[files.AddedToken]) -> Tokenizer:
    """The backend of a `tokenizer.json`, without its decoder and what it puts around texts.

    Args:
      content: the file.
      added: tokens that are found whole, with their ids.

    Raises:
      CheckpointError: damaged.
      ForeignVocabularyError: another kind of model, or steps that are not known here.
    """
    model = content.section("model")
    kind = model.content.get("type", "BPE")
    marks = [model.content.get(x) for x in ("continuing_subword_prefix", "end_of_word_suffix")]
    if kind != "BPE" or any(marks) or model.content.get("dropout"):
        raise ForeignVocabularyError(
            f"{model.where}: expected a BPE model without marks at words, found type "
            f"{shown(kind)}, marks {shown(marks)}."
        )
    unknown = model.get("unk_token", Optional(Text(512)), default=None)
    flags = ("byte_fallback", "fuse_unk", "ignore_merges")
    backend = _backend(
        model.section("vocab").content,
        read_merges(model),
        added,
        model.where,
        unk_token=unknown,
        **{flag: model.get(flag, FLAG, default=False) for flag in flags},
    )
    steps.install(backend, content)
    files.add_to(backend, added)
    return backend


def from_sentencepiece(
    model: SentencePieceModel, added: Sequence[files.AddedToken] = ()
) -> Tokenizer:
    """The backend of a SentencePiece BPE model, for text in which "▁" stands for a space.

    Raises:
      CheckpointError: byte fallback without the 256 byte pieces.
      ForeignVocabularyError: pieces that are not supported, or text that is normalised: rules of
        characters, removed white space, spaces behind words.
    """
    if model.charsmap or model.squeeze or model.suffix or {USER_DEFINED, UNUSED} & {*model.kinds}:
        raise ForeignVocabularyError(
            "expected a SentencePiece BPE model of Llama's kind (identity normaliser, white space "
            "kept, spaces before words, no user-defined or unused pieces), found another."
        )
    vocab = {text: number for number, (text, _) in enumerate(model.pieces)}
    names = [f"<0x{byte:02X}>" for byte in range(256)] if model.byte_fallback else []
    if any(model.kinds[vocab.get(name, 0)] != BYTE for name in names):
        raise CheckpointError("expected a piece for each of the 256 bytes, some are missing.")
    scores = {
        text: (-score, number)
        for number, ((text, score), kind) in enumerate(zip(model.pieces, model.kinds, strict=True))
        if kind == NORMAL
    }
    merges = []
    for text in sorted(scores, key=scores.__getitem__):
        splits = [(text[:k], text[k:]) for k in range(1, len(text))]
        known = [(a, b) for a, b in splits if a in scores and b in scores]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return _backend(
        vocab,
        merges,
        added,
        "vocabulary",
        unk_token=model.pieces[model.unknown][0],
        byte_fallback=model.byte_fallback,
        fuse_unk=True,
    )


def _backend(
    vocab: Mapping[str, Any],
    merges: Sequence[tuple[str, str]],
    added: Sequence[files.AddedToken],
    where: str,
    **options: Any,
) -> Tokenizer:
    if not 0 < len(vocab) <= _MAX_TOKENS or any(len(token) > _MAX_TOKEN for token in vocab):
        raise CheckpointError(
            f"{where}: expected 1 to {_MAX_TOKENS} tokens of at most {_MAX_TOKEN} characters, "
            f"found {len(vocab)}, the longest of {max(map(len, vocab), default=0)}."
        )
    # With the added tokens, whose ids `tokenizers` would otherwise count on from the model's.
    ids = files.check_ids(vocab, added, where)
    if options["unk_token"] is not None and options["unk_token"] not in ids:
        raise CheckpointError(
            f"{where}: expected the unknown token {shown(options['unk_token'])} among the tokens."
        )
    what = f"{where}: vocabulary and merges do not belong together, fetch the file again"
    model = files.guarded(lambda: models.BPE(vocab=ids, merges=list(merges), **options), what)
    return Tokenizer(model)
