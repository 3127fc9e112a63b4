"""SigLIP's tokenizer: a SentencePiece vocabulary of 32,000 pieces on cleaned text.

A text is stripped of ASCII punctuation, lower-cased, encoded, closed with the end token and padded
with it: the text tower has no mask, so padding is part of the input. Letters: B texts, T tokens.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
import pathlib
import re
import string
from collections.abc import Mapping, Sequence

import ftfy
import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from perception_jax.data.tokenization.protocol import Tokens
from perception_jax.data.tokenization.sentencepiece import SPACE, read_unigram, unigram_tokenizer
from perception_jax.errors import CheckpointError, ConfigError

END = "</s>"
_END_ID = 1
_JSON, _PIECES, _SETTINGS = "tokenizer.json", "spiece.model", "tokenizer_config.json"
_FILES = (_JSON, _PIECES, _SETTINGS, "special_tokens_map.json")
_OUR_CLEAN = "perception_jax_clean"
"""Key of a `tokenizer_config.json` for what Hugging Face's own keys cannot say."""
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ForeignVocabularyError(CheckpointError):
    """A vocabulary that is whole, but not of SigLIP's kind."""


@dataclasses.dataclass(frozen=True, eq=False)
class SiglipTokenizer:
    """Texts to ids of a fixed length; picklable.

    Attributes:
      files: the vocabulary's files by name, as they were found: `tokenizer.json` or `spiece.model`,
        and what lay beside them. Exports write them unchanged.
      context: T, the length of every encoded text.
      clean: "hf" as `transformers` cleans; "open_clip" also repairs mojibake, decodes HTML entities
        and takes an underscore for a space.

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
        if self.clean not in ("hf", "open_clip"):
            raise ConfigError(f"clean: expected 'hf' or 'open_clip', found {self.clean!r}.")
        backend = _backend(self.files)
        if backend.token_to_id(END) != _END_ID:
            raise ForeignVocabularyError(
                f"expected a vocabulary of SigLIP's kind, with {END} as token {_END_ID}; found "
                f"{backend.token_to_id(END)} among {backend.get_vocab_size()} tokens."
            )
        object.__setattr__(self, "_backend", backend)

    @classmethod
    def from_directory(
        cls, directory: str | os.PathLike, context: int = 64, clean: str = "hf"
    ) -> SiglipTokenizer:
        """From a checkpoint folder with `tokenizer.json` or `spiece.model`.

        Args:
          directory: holds the files.
          context: length of every encoded text.
          clean: see the class; a folder that we wrote knows better.

        Raises:
          CheckpointError: the files are missing or damaged.
          ForeignVocabularyError: the vocabulary is of another kind.
        """
        folder = pathlib.Path(directory)
        files = {name: (folder / name).read_bytes() for name in _FILES if (folder / name).is_file()}
        if not {_JSON, _PIECES} & files.keys():
            raise CheckpointError(f"{folder}: expected {_JSON} or {_PIECES}; found neither.")
        try:
            clean = json.loads(files.get(_SETTINGS, b"{}")).get(_OUR_CLEAN, clean)
        except (ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / _SETTINGS}: expected a JSON object: {error}."
            ) from error
        try:
            return cls(files, context, clean)
        except CheckpointError as error:
            raise type(error)(f"{folder}: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._backend.get_vocab_size()

    @property
    def end_id(self) -> int:
        """The id behind every text, and of the padding."""
        return _END_ID

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Encodes texts; one that is too long keeps its beginning and the end token."""
        ids = np.full((len(texts), self.context), _END_ID, np.int32)
        cleaned = [canonical(text, self.clean) for text in texts]
        encodings = self._backend.encode_batch(cleaned, add_special_tokens=False)
        for row, encoding in zip(ids, encodings, strict=True):
            body = encoding.ids[: self.context - 1]
            row[: len(body)] = body
        ended_before = np.cumsum(ids == _END_ID, axis=1) - (ids == _END_ID)
        return Tokens(ids, ended_before == 0)

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        """The text of one row of ids, up to its end token; for people to read."""
        ended = np.flatnonzero(ids == _END_ID)
        body = ids[: ended[0]] if ended.size else ids
        return self._backend.decode([int(i) for i in body]).strip()

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
        settings |= json.loads(self.files.get(_SETTINGS, b"{}"))
        settings["model_max_length"] = self.context
        settings |= {_OUR_CLEAN: self.clean} if self.clean != "hf" else {}
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def canonical(text: str, clean: str) -> str:
    """The text without punctuation, in lower case, with single spaces; `clean` as in the class."""
    if clean == "open_clip":
        text = html.unescape(html.unescape(ftfy.fix_text(text))).replace("_", " ")
    text = text.replace(SPACE, " ").translate(_PUNCTUATION).lower()
    return re.sub(r"\s+", " ", text).strip()


def _backend(files: Mapping[str, bytes]) -> Tokenizer:
    if _JSON not in files:
        return unigram_tokenizer(read_unigram(_PIECES, files[_PIECES]))
    try:
        tokenizer = Tokenizer.from_str(files[_JSON].decode("utf-8"))
    except Exception as error:  # the Rust side raises plain `Exception`
        raise CheckpointError(f"{_JSON}: expected a tokenizer, found {error}.") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
