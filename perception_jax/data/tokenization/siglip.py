"""SigLIP's tokenizer: a SentencePiece vocabulary of 32,000 pieces on cleaned text.

A text is stripped of ASCII punctuation, lower-cased, encoded, closed with the end token and padded:
the text tower has no mask, so padding is part of the input. Letters: B texts, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
import string
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Int, Int32
from tokenizers import Tokenizer

from perception_jax.data.inputs import as_texts
from perception_jax.data.tokenization import cleaning, files, unigram
from perception_jax.data.tokenization.cleaning import Aligned
from perception_jax.data.tokenization.files import AddedToken, ForeignVocabularyError
from perception_jax.data.tokenization.protocol import (
    Encoding,
    Tokens,
    padded_offsets,
)
from perception_jax.data.tokenization.sentencepiece import read_unigram
from perception_jax.data.tokenization.steps import SPACE
from perception_jax.errors import CheckpointError, ConfigError
from perception_jax.settings import FLAG, Choice, shown

END = "</s>"
"""The end token."""
_END_ID = 1
_PIECES = "spiece.model"
_FILES = (files.VOCABULARY, _PIECES, files.SETTINGS, files.SPECIALS, files.ADDED)
_OUR_CLEAN = "perception_jax_clean"
"""Key of a `tokenizer_config.json` for what Hugging Face's own keys cannot express."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_AS_SPACE = {ord(SPACE): " "}


@dataclasses.dataclass(frozen=True, eq=False)
class SiglipTokenizer:
    """SigLIP's tokenizer: texts to ids of a fixed length; picklable.

    Attributes:
      files: the vocabulary's files by name, as they were found: `tokenizer.json` or `spiece.model`,
        and the files next to them. Exports write them unchanged.
      context: T, the length of every encoded text.
      clean: "hf" as `transformers` cleans; "open_clip" also repairs mojibake, decodes HTML entities
        and takes an underscore for a space.

    Added and special tokens are found whole: with "hf" in the text as it is, as `transformers`
    does, with "open_clip" in the cleaned text.

    Raises:
      CheckpointError: the files are damaged.
      ForeignVocabularyError: the vocabulary is of another kind.
      ConfigError: a context without room for a token and the end.
    """

    files: Mapping[str, bytes]
    context: int = 64
    clean: str = "hf"

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ConfigError(f"context: expected at least 2 tokens, found {self.context}.")
        cleaning.check_clean(self.clean)
        backend = _backend(self.files)
        named = files.named_tokens(self.files)
        ids, whole = _special_ids(backend, files.added_tokens(self.files), named)
        if ids["eos_token"] != _END_ID:
            raise ForeignVocabularyError(
                f"expected a vocabulary of SigLIP's kind, with {END} as token {_END_ID}; found "
                f"{ids['eos_token']} among {backend.get_vocab_size()} tokens."
            )
        settings = files.read_object(self.files, files.SETTINGS)
        lower = settings.get("do_lower_case", FLAG, default=True)
        object.__setattr__(self, "_backend", backend)
        object.__setattr__(self, "_pad_id", ids["pad_token"])
        object.__setattr__(self, "_whole", whole)
        object.__setattr__(self, "_lower", lower or self.clean == "open_clip")

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike, context: int = 64, clean: str = "hf"
    ) -> SiglipTokenizer:
        """Reads a checkpoint folder with `tokenizer.json` or `spiece.model`.

        Args:
          directory: holds the files.
          context: length of every encoded text.
          clean: see the class; a folder that we wrote knows better.

        Raises:
          CheckpointError: the files are missing or damaged.
          ForeignVocabularyError: the vocabulary is of another kind.
        """
        folder = pathlib.Path(directory)
        found = files.read_files(folder, _FILES)
        if not {files.VOCABULARY, _PIECES} & found.keys():
            raise CheckpointError(
                f"{folder}: expected {files.VOCABULARY} or {_PIECES}; found neither."
            )
        try:
            settings = files.read_object(found, files.SETTINGS)
            clean = settings.get(_OUR_CLEAN, Choice(cleaning.CLEANINGS), default=clean)
            return cls(found, context, clean)
        except CheckpointError as error:
            raise type(error)(f"{folder}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding table: the largest id plus one."""
        return max(self._backend.get_vocab_size(), *(t.id + 1 for t in self._whole.values()))

    @property
    def has_added(self) -> bool:
        """Whether there are tokens after those of the SentencePiece vocabulary."""
        return self.vocab_size > self._backend.get_vocab_size()

    @property
    def end_id(self) -> int:
        """Id of the token that ends every text."""
        return _END_ID

    @property
    def pad_id(self) -> int:
        """The id behind the end token; the end token itself unless the settings name another."""
        return self._pad_id

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Encodes texts; one that is too long keeps its beginning and the end token."""
        texts = as_texts(texts)
        ids = np.full((len(texts), self.context), self.pad_id, np.int32)
        plain = [self._one_part(text) for text in texts]
        whole = [text for text in plain if text is not None]
        encodings = iter(self._backend.encode_batch(whole, add_special_tokens=False))
        for row, text, simple in zip(ids, texts, plain, strict=True):
            found = self.encode(text).ids if simple is None else next(encodings).ids
            body = found[: self.context - 1]
            row[: len(body)] = body
            row[len(body)] = _END_ID
        ended_before = np.cumsum(ids == _END_ID, axis=1) - (ids == _END_ID)
        return Tokens(ids, ended_before == 0)

    def encode(self, text: str) -> Encoding:
        """The tokens of one text with their places in it, without the end token."""
        ids: list[int] = []
        offsets: list[Int32[np.ndarray, "T 2"]] = [np.zeros((0, 2), np.int32)]
        for token, part, first in self._parts(text):
            if token is not None:
                ids.append(token.id)
                offsets.append(part.at(np.array([[0, len(part.text)]], np.int32)))
                continue
            backend = self._backend if first else self._further
            found = backend.encode(part.text, add_special_tokens=False)
            ids += found.ids
            offsets.append(part.at(np.array(found.offsets, np.int32).reshape(-1, 2)))
        return Encoding(np.array(ids, np.int32), np.concatenate(offsets))

    def offsets(self, texts: Sequence[str]) -> Int32[np.ndarray, "B T 2"]:
        """First character and the one behind the last of each token, in rows as of `__call__`;
        (0, 0) for end and padding. The space before a word belongs to its first token."""
        encodings = [self.encode(text) for text in as_texts(texts)]
        return padded_offsets(encodings, self.context, start=0, end=1)

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        """The text of one row of ids, up to its end token."""
        ended = np.flatnonzero(ids == _END_ID)
        body = [int(i) for i in (ids[: ended[0]] if ended.size else ids)]
        added = {token.id: token for token in self._whole.values()}
        parts: list[str] = []
        run: list[int] = []
        for number in [*body, None]:
            if number is not None and number not in added:
                run.append(number)
                continue
            parts.append(self._backend.decode(run).strip())
            run = []
            if number is not None and not added[number].special:
                parts.append(added[number].content)
        return " ".join(part for part in parts if part)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `transformers.SiglipTokenizer` and `from_directory` read."""
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "tokenizer_class": "SiglipTokenizer",
            "do_lower_case": True,
            "eos_token": END,
            "pad_token": END,
            "unk_token": "<unk>",
        }
        settings |= files.read_object(self.files, files.SETTINGS).content
        settings["model_max_length"] = self.context
        settings |= {_OUR_CLEAN: self.clean} if self.clean != "hf" else {}
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        (folder / files.SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")

    @functools.cached_property
    def _further(self) -> Tokenizer:
        """For what follows an added token, which does not begin a text."""
        return unigram.without_prefix(self._backend)

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        longest_first = sorted(self._whole, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def _clean(self, text: Aligned) -> Aligned:
        if self.clean == "open_clip":
            text = text.repaired().translated({ord("_"): " "})
        text = text.translated(_AS_SPACE).translated(_PUNCTUATION)
        return (text.lowered() if self._lower else text).collapsed()

    def _one_part(self, text: str) -> str | None:
        """The cleaned text if no token is to be found whole in it."""
        cleaned = canonical(text, self.clean, lower=self._lower)
        where = text if self.clean == "hf" else cleaned
        return None if self._pattern is not None and self._pattern.search(where) else cleaned

    def _parts(self, text: str) -> Iterator[tuple[AddedToken | None, Aligned, bool]]:
        """The tokens found whole and the cleaned texts between them; whether at the beginning."""
        before = Aligned.of(text) if self.clean == "hf" else self._clean(Aligned.of(text))
        at = 0
        matches = () if self._pattern is None else self._pattern.finditer(before.text)
        for match in [*matches, None]:
            end = len(before.text) if match is None else match.start()
            part = before.cut(at, end)
            part = self._clean(part) if self.clean == "hf" else part
            if part.text:
                yield None, part, at == 0
            if match is not None:
                yield self._whole[match[0]], before.cut(match.start(), match.end()), False
                at = match.end()


def canonical(text: str, clean: str, *, lower: bool = True) -> str:
    """The text without punctuation, in lower case, with single spaces; `clean` as in the class."""
    if clean == "open_clip":
        text = cleaning.repair(text).replace("_", " ")
    text = text.replace(SPACE, " ").translate(_PUNCTUATION)
    return cleaning.collapse(text.lower() if lower else text)


def _backend(found: Mapping[str, bytes]) -> Tokenizer:
    if files.VOCABULARY in found:
        return unigram.unigram_from_json(files.read_object(found, files.VOCABULARY))
    return unigram.unigram_tokenizer(read_unigram(_PIECES, found[_PIECES]))


def _special_ids(
    backend: Tokenizer, added: Sequence[AddedToken], named: Mapping[str, AddedToken | None]
) -> tuple[dict[str, int | None], dict[str, AddedToken]]:
    """The ids of the named special tokens, and all tokens that are found whole, by their text."""
    whole = {token.content: token for token in added}
    for token in added:
        known = backend.token_to_id(token.content)
        if known != token.id and (known is not None or token.id < backend.get_vocab_size()):
            raise CheckpointError(
                f"expected the added token {shown(token.content)} with an id of its own, found "
                f"{token.id}, and {known} in the vocabulary."
            )
    if len({token.id for token in added}) != len(added):
        raise CheckpointError("expected one added token for each id, found two with the same one.")
    ids: dict[str, int | None] = {}
    for key, default in (("eos_token", END), ("pad_token", END), ("unk_token", "<unk>")):
        token = named.get(key)
        content = default if token is None else token.content
        known = whole[content].id if content in whole else backend.token_to_id(content)
        if known is None and token is not None and key == "pad_token":
            raise CheckpointError(f"the settings' {key} {shown(content)} is not in the vocabulary.")
        ids[key] = known
        if known is not None:
            whole.setdefault(content, AddedToken(content, known, special=True))
    return ids, whole
