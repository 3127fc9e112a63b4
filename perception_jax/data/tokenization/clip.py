"""CLIP's byte-level BPE (Radford et al., 2021, arXiv 2103.00020) on the `tokenizers` package.

Text is cleaned (mojibake repaired, HTML entities decoded, white space collapsed, lower case), split
into words, contractions, digits and runs of punctuation, and merged. The vocabulary is 256 byte
symbols, the same 256 with an end-of-word mark, one entry per merge, then the two specials; so the
first n merges alone make a smaller tokenizer of the same kind.

Letters: B texts, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import html
import importlib.resources
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ftfy
import numpy as np
from jaxtyping import Int
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from perception_jax.data.tokenization.protocol import Tokens
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.files import write_whole

START = "<|startoftext|>"
END = "<|endoftext|>"
FULL_VOCAB_SIZE = 49408

_WORD_END = "</w>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BYTES_AND_SPECIALS = 2 * 256 + 2


@dataclasses.dataclass(frozen=True, eq=False)
class ClipTokenizer:
    """Texts to ids of a fixed length; picklable.

    Attributes:
      vocab: id of each token, both specials among them.
      merges: pairs in order of priority.
      context: T, the length of every encoded text.
      pad_id: fills up behind the end token; None for the end token itself, as Hugging Face does
        (OpenAI's own code pads with 0).

    Raises:
      CheckpointError: the vocabulary lacks a special token, or does not fit the merges.
      ConfigError: a context too short for the two specials.
    """

    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    context: int = 77
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ConfigError(f"context: expected at least 2 tokens, found {self.context}.")
        for special in (START, END):
            if special not in self.vocab:
                raise CheckpointError(f"vocabulary: expected the token {special}, found none.")
        object.__setattr__(self, "_backend", _backend(dict(self.vocab), list(self.merges)))

    @classmethod
    def shipped(
        cls, vocab_size: int = FULL_VOCAB_SIZE, context: int = 77, *, pad_id: int | None = None
    ) -> ClipTokenizer:
        """CLIP's own tokenizer, or the smaller one that keeps only its first merges.

        Args:
          vocab_size: 49408 for CLIP's own; at least 514 (bytes and specials, no merges).
          context: length of every encoded text.
          pad_id: see the class.

        Raises:
          ConfigError: a vocabulary size out of range.
        """
        if not _BYTES_AND_SPECIALS <= vocab_size <= FULL_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size: expected {_BYTES_AND_SPECIALS} to {FULL_VOCAB_SIZE}, "
                f"found {vocab_size}."
            )
        merges = _shipped_merges()[: vocab_size - _BYTES_AND_SPECIALS]
        symbols = _byte_symbols()
        tokens = [*symbols, *(symbol + _WORD_END for symbol in symbols)]
        tokens += ["".join(pair) for pair in merges] + [START, END]
        vocab = {token: index for index, token in enumerate(tokens)}
        return cls(vocab, merges, context, pad_id)

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike, context: int | None = None
    ) -> ClipTokenizer:
        """From a Hugging Face folder: `tokenizer.json`, or `vocab.json` and `merges.txt`.

        Args:
          directory: holds the files.
          context: None for what the folder's `tokenizer_config.json` says, 77 if it says nothing.

        Raises:
          CheckpointError: the files are missing, damaged, or not of CLIP's kind.
        """
        folder = pathlib.Path(directory)
        if (folder / "tokenizer.json").is_file():
            vocab, merges = _read_tokenizer_json(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab, merges = _read_json(folder / "vocab.json"), _read_merges(folder / "merges.txt")
        else:
            raise CheckpointError(
                f"{folder}: expected tokenizer.json, or vocab.json and merges.txt; found neither."
            )
        settings = {}
        if (folder / "tokenizer_config.json").is_file():
            settings = _read_json(folder / "tokenizer_config.json")
        length = settings.get("model_max_length", 77)
        # Hugging Face writes a huge number for "no limit".
        context = context or (length if length < 1_000_000 else 77)
        padding = settings.get("pad_token") or END
        token = padding["content"] if isinstance(padding, Mapping) else padding
        if token not in vocab:
            raise CheckpointError(f"{folder}: the pad token {token!r} is not in the vocabulary.")
        return cls(vocab, merges, context, vocab[token])

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.vocab)

    @property
    def start_id(self) -> int:
        """The id in front of every text."""
        return self.vocab[START]

    @property
    def end_id(self) -> int:
        """The id behind every text; where CLIP's text tower is read."""
        return self.vocab[END]

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Encodes texts; one that is too long keeps its beginning and the end token."""
        pad = self.end_id if self.pad_id is None else self.pad_id
        ids = np.full((len(texts), self.context), pad, np.int32)
        for row, encoding in zip(ids, self._encode(texts), strict=True):
            body = encoding.ids[: self.context - 2]
            row[: len(body) + 2] = [self.start_id, *body, self.end_id]
        ended_before = np.cumsum(ids == self.end_id, axis=1) - (ids == self.end_id)
        return Tokens(ids, ended_before == 0)

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        """The text of one row of ids, up to its end token; for people to read."""
        ended = np.flatnonzero(ids == self.end_id)
        body = ids[: ended[0]] if ended.size else ids
        text = self._backend.decode([int(i) for i in body if i != self.start_id])
        return text.replace(_WORD_END, " ").strip()

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `transformers.CLIPTokenizer` and `from_directory` read."""
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        by_id = {index: token for token, index in self.vocab.items()}
        padding = END if self.pad_id is None else by_id[self.pad_id]
        specials = {
            "bos_token": START,
            "eos_token": END,
            "unk_token": END,
            "pad_token": padding,
        }
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.context,
            "do_lower_case": True,
            "add_prefix_space": False,
            **specials,
        }
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        write_whole(folder / "vocab.json", json.dumps(dict(self.vocab), ensure_ascii=False))
        write_whole(folder / "merges.txt", f"#version: 0.2\n{merges}")
        write_whole(folder / "special_tokens_map.json", json.dumps(specials, indent=2))
        write_whole(folder / "tokenizer_config.json", json.dumps(settings, indent=2))
        write_whole(folder / "tokenizer.json", self._standalone().to_str(pretty=True))

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        cleaned = [clean(text) for text in texts]
        return self._backend.encode_batch(cleaned, add_special_tokens=False)

    def _standalone(self) -> Tokenizer:
        """A `tokenizers` pipeline that also cleans, as far as it can, and adds the specials."""
        tokenizer = Tokenizer.from_str(self._backend.to_str())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        tokenizer.post_processor = processors.RobertaProcessing(
            (END, self.end_id),
            (START, self.start_id),
            trim_offsets=False,
            add_prefix_space=False,
        )
        return tokenizer


def clean(text: str) -> str:
    """Repairs mojibake, decodes HTML entities, collapses white space, lowers the case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip().lower()


def _backend(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    try:
        model = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix=_WORD_END)
    except Exception as error:  # the Rust side raises plain `Exception`
        raise CheckpointError(
            f"vocabulary and merges do not belong together: {error}. Fetch both files again."
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    return tokenizer


@functools.cache
def _shipped_merges() -> tuple[tuple[str, str], ...]:
    packed = importlib.resources.files("perception_jax.data") / "assets" / "clip_merges.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    return tuple(_pair(line) for line in lines if line)


def _pair(line: str) -> tuple[str, str]:
    left, _, right = line.partition(" ")
    return left, right


def _byte_symbols() -> list[str]:
    """A printable character for each byte, in the order of CLIP's vocabulary.

    Printable Latin-1 bytes stand for themselves and come first; the others follow, in order, as the
    characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + k) for k in range(256 - len(printable))]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}). Fetch the file again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def _read_merges(path: pathlib.Path) -> list[tuple[str, str]]:
    lines = path.read_text(encoding="utf-8").split("\n")
    return [_pair(line) for line in lines if line and not line.startswith("#version")]


def _read_tokenizer_json(path: pathlib.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    content = _read_json(path)
    model = content.get("model", {})
    found = (model.get("type", "BPE"), model.get("end_of_word_suffix"))
    if found != ("BPE", _WORD_END) or "vocab" not in model or "merges" not in model:
        raise CheckpointError(
            f"{path}: expected a BPE model with end_of_word_suffix {_WORD_END!r} (CLIP's kind), "
            f"found type {found[0]!r} with suffix {found[1]!r}."
        )
    vocab = dict(model["vocab"])
    vocab |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    pairs = model["merges"]
    return vocab, [_pair(p) if isinstance(p, str) else (p[0], p[1]) for p in pairs]
