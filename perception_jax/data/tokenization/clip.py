"""CLIP's byte-level BPE (Radford et al., 2021, arXiv 2103.00020) on the `tokenizers` package.

Text is cleaned, lower-cased, split into words, contractions, digits and runs of punctuation, and
merged. The vocabulary is 256 byte symbols, the same 256 with an end-of-word mark, one entry per
merge, then the two specials; so the first n merges alone make a smaller tokenizer of the same kind.
Tokens that were added later are found whole before the text is split.

There are two references, which clean differently (`clean`): `transformers.CLIPTokenizer` normalises
to NFC and collapses white space ("hf"); the authors' code and open_clip also repair mojibake, curly
quotes, ligatures and full-width letters (ftfy) and decode HTML entities ("open_clip").

Letters: B texts, T tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import gzip
import importlib.resources
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Int32
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from perception_jax.data.inputs import as_texts
from perception_jax.data.tokenization import bpe, cleaning, files
from perception_jax.data.tokenization.files import AddedToken, ForeignVocabularyError
from perception_jax.data.tokenization.protocol import (
    Encoding,
    Tokens,
    padded_offsets,
)
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.files import write_whole
from perception_jax.settings import Choice, shown

START = "<|startoftext|>"
"""The start token."""
END = "<|endoftext|>"
"""The end token."""
FULL_VOCAB_SIZE = 49408
"""Size of CLIP's published vocabulary."""

_WORD_END = "</w>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_BYTES_AND_SPECIALS = 2 * 256 + 2
_FILES = (*("vocab.json", "merges.txt"), *(files.VOCABULARY, files.SETTINGS, files.SPECIALS))
_OUR_CLEAN, _OUR_PAD = "perception_jax_clean", "perception_jax_pad_id"
"""Keys of a `tokenizer_config.json` for what Hugging Face's own keys cannot express."""


@dataclasses.dataclass(frozen=True, eq=False)
class ClipTokenizer:
    """Texts to ids of a fixed length; picklable.

    Attributes:
      vocab: id of each token of the BPE model.
      merges: pairs in order of priority.
      context: T, the length of every encoded text.
      pad_id: fills up behind the end token; None for the end token itself, as Hugging Face does
        (OpenAI's own code pads with 0).
      clean: "hf" as `transformers` cleans; "open_clip" as the authors' code and open_clip do.
      added: tokens found whole. With "hf" as in `transformers`; with "open_clip" all of them in the
        cleaned, lower-cased text.
      start, end: the tokens around every text; in the vocabulary or added.
      unknown: stands for bytes that the vocabulary lacks; None drops them.

    Raises:
      CheckpointError: the vocabulary lacks a special token, or does not fit the merges.
      ConfigError: a context too short for the two specials, or an unknown way of cleaning.
    """

    vocab: Mapping[str, int]
    merges: Sequence[tuple[str, str]]
    context: int = 77
    pad_id: int | None = None
    clean: str = "hf"
    added: tuple[AddedToken, ...] = ()
    start: str = START
    end: str = END
    unknown: str | None = None

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ConfigError(f"context: expected at least 2 tokens, found {self.context}.")
        cleaning.check_clean(self.clean)
        ids = files.check_ids(self.vocab, self.added, "vocabulary")
        for special in (self.start, self.end, self.unknown):
            if special is not None and special not in ids:
                raise CheckpointError(
                    f"vocabulary: expected the token {shown(special)}, found none."
                )
        if self.pad_id is not None and self.pad_id not in ids.values():
            raise CheckpointError(f"vocabulary: the pad token's id {self.pad_id} is no token's.")
        object.__setattr__(self, "_ids", ids)
        object.__setattr__(self, "_size", 1 + max(ids.values()))
        object.__setattr__(self, "_backend", self._build(ids))

    @classmethod
    def shipped(
        cls,
        vocab_size: int = FULL_VOCAB_SIZE,
        context: int = 77,
        *,
        pad_id: int | None = None,
        clean: str = "open_clip",
    ) -> ClipTokenizer:
        """CLIP's own tokenizer, or the smaller one that keeps only its first merges.

        Args:
          vocab_size: 49408 for CLIP's own; at least 514 (bytes and specials, no merges).
          context: length of every encoded text.
          pad_id, clean: see the class.

        Raises:
          ConfigError: a vocabulary size out of range.
        """
        if not _BYTES_AND_SPECIALS <= vocab_size <= FULL_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size: expected {_BYTES_AND_SPECIALS} to {FULL_VOCAB_SIZE}, "
                f"found {vocab_size}."
            )
        merges = _shipped_merges()[: vocab_size - _BYTES_AND_SPECIALS]
        symbols = bpe.byte_symbols()
        tokens = [*symbols, *(symbol + _WORD_END for symbol in symbols)]
        tokens += ["".join(pair) for pair in merges] + [START, END]
        vocab = {token: index for index, token in enumerate(tokens)}
        return cls(vocab, merges, context, pad_id, clean)

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike, context: int | None = None, clean: str = "hf"
    ) -> ClipTokenizer:
        """Reads a Hugging Face folder: `tokenizer.json`, or `vocab.json` and `merges.txt`.

        The special tokens are those that the settings name; added tokens are read from all the
        files in which Hugging Face has kept them.

        Args:
          directory: holds the files.
          context: None for what the folder's `tokenizer_config.json` says, 77 if it says nothing.
          clean: see the class; a folder that we wrote knows better.

        Raises:
          CheckpointError: the files are missing or damaged.
          ForeignVocabularyError: a `tokenizer.json` of another kind.
        """
        folder = pathlib.Path(directory)
        found = files.read_files(folder, (*_FILES, files.ADDED))
        if not (files.VOCABULARY in found or {"vocab.json", "merges.txt"} <= found.keys()):
            raise CheckpointError(
                f"{folder}: expected tokenizer.json, or vocab.json and merges.txt; found neither."
            )
        try:
            return cls(**_read(found, context, clean))
        except CheckpointError as error:
            raise type(error)(f"{folder}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs: one more than the largest id."""
        return self._size

    @property
    def start_id(self) -> int:
        """The id in front of every text."""
        return self._ids[self.start]

    @property
    def end_id(self) -> int:
        """The id behind every text; where CLIP's text tower is read."""
        return self._ids[self.end]

    @property
    def is_openai(self) -> bool:
        """Whether the vocabulary is CLIP's own, which the authors' code and open_clip bring along:
        49,408 tokens, none added."""
        own = ClipTokenizer.shipped().vocab if len(self._ids) == FULL_VOCAB_SIZE else None
        return self._ids == own and (self.start, self.end) == (START, END)

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Encodes texts; one that is too long keeps its beginning and the end token."""
        texts = as_texts(texts)
        if self.clean == "open_clip":
            texts = [clean(text) for text in texts]
        pad = self.end_id if self.pad_id is None else self.pad_id
        ids = np.full((len(texts), self.context), pad, np.int32)
        encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        for row, encoding in zip(ids, encodings, strict=True):
            body = encoding.ids[: self.context - 2]
            row[: len(body) + 2] = [self.start_id, *body, self.end_id]
        ended_before = np.cumsum(ids == self.end_id, axis=1) - (ids == self.end_id)
        return Tokens(ids, ended_before == 0)

    def encode(self, text: str) -> Encoding:
        """The tokens of one text with their places in it, without start and end."""
        aligned = _cleaned(text) if self.clean == "open_clip" else cleaning.Aligned.of(text)
        found = self._backend.encode(aligned.text, add_special_tokens=False)
        offsets = np.array(found.offsets, np.int32).reshape(-1, 2)
        return Encoding(np.array(found.ids, np.int32), aligned.at(offsets))

    def offsets(self, texts: Sequence[str]) -> Int32[np.ndarray, "B T 2"]:
        """First character and the one behind the last of each token, in rows as of `__call__`;
        (0, 0) for start, end and padding."""
        encodings = [self.encode(text) for text in as_texts(texts)]
        return padded_offsets(encodings, self.context, start=1, end=1)

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        """The text of one row of ids, up to its end token."""
        ended = np.flatnonzero(ids == self.end_id)
        body = ids[: ended[0]] if ended.size else ids
        text = self._backend.decode([int(i) for i in body if i != self.start_id])
        return text.replace(_WORD_END, " ").strip()

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `transformers.CLIPTokenizer` and `from_directory` read.

        Hugging Face's files cannot express the authors' cleaning, nor that padding is no special
        token; extra keys store both.
        """
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        padding, own = self.end, {}
        if self.clean != "hf":
            own[_OUR_CLEAN] = self.clean
        if self.pad_id is not None and self.pad_id != self.end_id:
            # In Hugging Face the pad token is found whole in texts; CLIP's 0 is "!".
            if self.clean == "hf":
                padding = next(token for token, k in self._ids.items() if k == self.pad_id)
            else:
                own[_OUR_PAD] = self.pad_id
        specials = {
            "bos_token": self.start,
            "eos_token": self.end,
            "unk_token": self.unknown or self.end,
            "pad_token": padding,
        }
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.context,
            "do_lower_case": True,
            "add_prefix_space": False,
            **specials,
            **own,
        }
        if self.added:
            settings["added_tokens_decoder"] = {t.id: t.flags() for t in self.added}
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        write_whole(folder / "vocab.json", json.dumps(dict(self.vocab), ensure_ascii=False))
        write_whole(folder / "merges.txt", f"#version: 0.2\n{merges}")
        write_whole(folder / files.SPECIALS, json.dumps(specials, indent=2))
        write_whole(folder / files.SETTINGS, json.dumps(settings, indent=2))
        write_whole(folder / files.VOCABULARY, self._standalone().to_str(pretty=True))

    def _build(self, ids: Mapping[str, int]) -> Tokenizer:
        """The pipeline that encodes; in the vocabulary of its model the added tokens have the ids
        of the files, which `tokenizers` would otherwise count on from the model's."""
        found = self._found_whole(ids)
        if self.clean == "open_clip":
            lowered = {token.content: clean(token.content) for token in found}
            counts = collections.Counter(lowered.values())
            for token, text in lowered.items():
                other = ids.get(text, ids[token])
                if not text or other != ids[token] or counts[text] > 1:
                    raise CheckpointError(
                        f"vocabulary: expected the added token {shown(token)} to differ from all "
                        f"others after cleaning, found {shown(text)}."
                    )
            # One token for each id: a backend that is pickled keeps only one of two.
            cleaned = {text: ids[token] for token, text in lowered.items()}
            ids = {token: k for token, k in ids.items() if lowered.get(token, token) == token}
            ids |= cleaned
            found = [
                dataclasses.replace(token, content=lowered[token.content], normalized=False)
                for token in found
            ]
        tokenizer = _pipeline(ids, self.merges, self.unknown)
        if self.clean == "hf":
            tokenizer.normalizer = _hf_normalizer()
        files.add_to(tokenizer, found)
        return tokenizer

    def _found_whole(self, ids: Mapping[str, int]) -> list[AddedToken]:
        """The added tokens and the specials; Hugging Face has the pad token among these."""
        specials = {self.start, self.end}
        if self.clean == "hf":
            specials |= {token for token, number in ids.items() if number == self.pad_id}
            specials |= {self.unknown} - {None}
        listed = {token.content: token for token in self.added}
        for content in specials - listed.keys():
            listed[content] = AddedToken(content, ids[content], special=True, normalized=False)
        return list(listed.values())

    def _standalone(self) -> Tokenizer:
        """A `tokenizers` pipeline that also cleans, as far as it can, and adds the specials."""
        found = self._found_whole(self._ids)
        for vocab in (self.vocab, self._ids):  # the whole one where ids do not just count on
            tokenizer = _pipeline(vocab, self.merges, self.unknown)
            tokenizer.normalizer = _hf_normalizer()
            files.add_to(tokenizer, found)
            if all(tokenizer.token_to_id(token.content) == token.id for token in found):
                break
        tokenizer.post_processor = processors.RobertaProcessing(
            (self.end, self.end_id),
            (self.start, self.start_id),
            trim_offsets=False,
            add_prefix_space=False,
        )
        return tokenizer


def clean(text: str) -> str:
    """Repairs mojibake, decodes HTML entities, collapses white space, lowers the case."""
    return cleaning.collapse(cleaning.repair(text)).lower()


def _cleaned(text: str) -> cleaning.Aligned:
    steps = (cleaning.Aligned.repaired, cleaning.Aligned.collapsed, cleaning.Aligned.lowered)
    return cleaning.in_steps(text, *steps)


def _hf_normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )


def _pipeline(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], unknown: str | None
) -> Tokenizer:
    options = {} if unknown is None else {"unk_token": unknown}

    def make() -> models.BPE:
        pairs = [(left, right) for left, right in merges]
        return models.BPE(vocab=dict(vocab), merges=pairs, end_of_word_suffix=_WORD_END, **options)

    what = "vocabulary and merges do not belong together, fetch both files again"
    tokenizer = Tokenizer(files.guarded(make, what))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@functools.cache
def _shipped_merges() -> tuple[tuple[str, str], ...]:
    packed = importlib.resources.files("perception_jax.data") / "assets" / "clip_merges.txt.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
    return tuple(bpe.pair(line) for line in lines if line)


def _read(found: Mapping[str, bytes], context: int | None, clean: str) -> dict[str, Any]:
    """The fields of a tokenizer from a folder's files."""
    if files.VOCABULARY in found:
        vocab, merges = _read_tokenizer_json(found)
    else:
        vocab = files.read_object(found, "vocab.json").content
        merges = _read_merges(found["merges.txt"])
    settings = files.read_object(found, files.SETTINGS)
    clean = settings.get(_OUR_CLEAN, Choice(cleaning.CLEANINGS), default=clean)
    added = files.added_tokens(found)
    ids = files.check_ids(vocab, added, files.VOCABULARY)
    named = files.named_tokens(found)
    listed = {token.content for token in added}
    contents = {}
    for key, token in named.items():
        contents[key] = None if token is None else token.content
        if token is None or token.content in listed:
            continue
        if token.content not in ids:
            raise CheckpointError(
                f"the settings' {key} {shown(token.content)} is not in the vocabulary."
            )
        if token.normalized:  # otherwise as the specials are treated anyway
            added += (dataclasses.replace(token, id=ids[token.content]),)
            listed.add(token.content)
    start, end = contents.get("bos_token") or START, contents.get("eos_token") or END
    plain = {
        AddedToken(x, ids[x], special=True, normalized=False) for x in (start, end) if x in ids
    }
    pad = contents.get("pad_token") or end
    return {
        "vocab": vocab,
        "merges": merges,
        "context": context or files.read_context(settings, 77),
        "pad_id": settings.get(_OUR_PAD, files.ID, default=ids.get(pad)),
        "clean": clean,
        "added": tuple(token for token in added if token not in plain),
        "start": start,
        "end": end,
        "unknown": contents.get("unk_token", end if end in ids else None),
    }


def _read_merges(content: bytes) -> list[tuple[str, str]]:
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"merges.txt: expected UTF-8: {error}.") from error
    lines = [line.removesuffix("\r") for line in lines]
    return [bpe.pair(line) for line in lines if line and not line.startswith("#version")]


def _read_tokenizer_json(
    found: Mapping[str, bytes],
) -> tuple[Mapping[str, Any], list[tuple[str, str]]]:
    model = files.read_object(found, files.VOCABULARY).section("model")
    kind = (model.content.get("type", "BPE"), model.content.get("end_of_word_suffix"))
    if kind != ("BPE", _WORD_END):
        raise ForeignVocabularyError(
            f"{model.where}: expected a BPE model with end_of_word_suffix {_WORD_END!r} (CLIP's "
            f"kind), found type {shown(kind[0])} with suffix {shown(kind[1])}."
        )
    return model.section("vocab").content, bpe.read_merges(model)
