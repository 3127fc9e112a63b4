"""Protocols of tokenizers. Letters: B texts, T tokens."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Int32

from perception_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """Encoded texts of one length.

    Attributes:
      ids: start (where the tokenizer has one), tokens, end, padding.
      mask: True up to and including the first end token.
    """

    ids: Int32[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]


@dataclasses.dataclass(frozen=True, slots=True)
class Encoding:
    """One encoded text without truncation, start, end and padding tokens.

    Attributes:
      ids: the tokens.
      offsets: for each token its first character in the original text and the one behind its last,
        so that `text[first:last]` is what it stands for. Tokens that spell one character in bytes
        share its span; where cleaning replaced a passage, its tokens have the span of the passage.
    """

    ids: Int32[np.ndarray, "T"]
    offsets: Int32[np.ndarray, "T 2"]


@runtime_checkable
class Tokenizer(Protocol):
    """Protocol of a tokenizer: texts to ids and back."""

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding table: the largest id plus one."""

    @property
    def end_id(self) -> int:
        """Id of the token that ends every text."""

    def encode(self, text: str) -> Encoding:
        """The tokens of one text with their places in it."""

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        """The text of ids without special tokens; a text tower's ends at the first end token."""

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the files that `transformers` and this library read."""


@runtime_checkable
class PaddedTokenizer(Tokenizer, Protocol):
    """A tokenizer of a text tower: every text becomes a row of one length.

    Attributes:
      context: T, the length of the rows.
    """

    context: int

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """Encodes texts; one that is too long keeps its beginning and the end token."""

    def offsets(self, texts: Sequence[str]) -> Int32[np.ndarray, "B T 2"]:
        """The spans of the tokens in rows of `__call__`, as in `Encoding`; (0, 0) for start, end
        and padding."""


def check_fits(
    tokenizer: Tokenizer, *, rows: int, end_id: int | None = None, where: str = "tokenizer"
) -> None:
    """Checks that a tokenizer matches a text tower.

    Args:
      rows: of the tower's embedding table; it may have more than the tokenizer has ids.
      end_id: the end token that the tower is read at; None if it is read otherwise.
      where: the tokenizer comes from, for messages.

    Raises:
      CheckpointError: ids beyond the table, or another end token.
    """
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"{where}: expected a tokenizer for the model's {rows} token embeddings, found one "
            f"with ids up to {tokenizer.vocab_size - 1}. Is it the tokenizer of another model, or "
            "are tokens missing in the embedding table?"
        )
    if end_id is not None and tokenizer.end_id != end_id:
        raise CheckpointError(
            f"{where}: the model is read at the end token {end_id} (eos_token_id in its settings), "
            f"and the tokenizer ends texts with {tokenizer.end_id}. Correct the one that is wrong; "
            "2 in the settings stands for the largest id."
        )


def padded_offsets(
    encodings: Sequence[Encoding], context: int, *, start: int, end: int
) -> Int32[np.ndarray, "B T 2"]:
    """Offsets of rows with `start` tokens before and `end` tokens behind each text."""
    result = np.zeros((len(encodings), context, 2), np.int32)
    for row, encoding in zip(result, encodings, strict=True):
        body = encoding.offsets[: context - start - end]
        row[start : start + len(body)] = body
    return result
