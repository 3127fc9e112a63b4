"""Unigram tokenizers (Kudo, arXiv 1804.10959) on the `tokenizers` package, from checked parts only.

The compiled code trusts its files: a normaliser's table that points outside of itself, or a piece
of a megabyte, ends the process. Everything is checked here before it is handed over, and of a
`tokenizer.json` only steps of known kinds are taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from perception_jax.data.tokenization import steps
from perception_jax.data.tokenization.files import ForeignVocabularyError, guarded
from perception_jax.data.tokenization.steps import SPACE
from perception_jax.errors import CheckpointError
from perception_jax.settings import FLAG, Integer, Settings, shown

_MAX_PIECES, _MAX_PIECE, _MAX_TEXT = 1 << 19, 512, 1 << 23
"""Pieces, bytes of one, bytes of all."""
_MAX_SCORE = 1e9


@dataclasses.dataclass(frozen=True)
class UnigramModel:
    """Pieces and settings of a unigram tokenizer.

    Attributes:
      pieces: with their logarithmic probabilities, in order of ids.
      unknown: id of the unknown piece.
      charsmap: compiled rules of the normaliser; empty for none.
      dummy_prefix: whether a text is read as if it began with a space.
      byte_fallback: whether unknown characters are spelt in bytes.

    Raises:
      CheckpointError: pieces or rules that no training makes.
    """

    pieces: tuple[tuple[str, float], ...]
    unknown: int
    charsmap: bytes
    dummy_prefix: bool
    byte_fallback: bool

    def __post_init__(self) -> None:
        check_pieces(self.pieces)
        if self.charsmap:
            steps.check_charsmap(self.charsmap)


def unigram_tokenizer(model: UnigramModel) -> Tokenizer:
    """Builds a `tokenizers` pipeline that encodes as SentencePiece does, without special tokens."""
    tokenizer = _backend(model.pieces, model.unknown, byte_fallback=model.byte_fallback)
    charsmap = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    tokenizer.normalizer = normalizers.Sequence(
        [*charsmap, normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    scheme = "always" if model.dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    return tokenizer


def unigram_from_json(content: Settings) -> Tokenizer:
    """The same from a `tokenizer.json`, without its added tokens, special tokens, padding and
    truncation.

    Raises:
      CheckpointError: damaged.
      ForeignVocabularyError: another kind of model, or steps that are not known here.
    """
    model = content.section("model")
    if model.content.get("type", "Unigram") != "Unigram":
        raise ForeignVocabularyError(
            f"{model.where}: expected a Unigram model, found {shown(model.content.get('type'))}."
        )
    pieces = model.content.get("vocab")
    pairs = isinstance(pieces, list) and all(isinstance(p, list) and len(p) == 2 for p in pieces)
    if not pairs:
        raise CheckpointError(f"{model.where}: vocab: expected a list of pieces with their scores.")
    pieces = [(piece, score) for piece, score in pieces]
    check_pieces(pieces)
    unknown = model.get("unk_id", Integer(0, len(pieces) - 1))
    fallback = model.get("byte_fallback", FLAG, default=False)
    tokenizer = _backend(pieces, unknown, byte_fallback=fallback)
    steps.install(tokenizer, content)
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme="always")
    return tokenizer


def without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer for text that continues another, without a leading space."""
    content = json.loads(tokenizer.to_str())
    steps = content["pre_tokenizer"]
    for step in steps.get("pretokenizers", [steps]):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    return Tokenizer.from_str(json.dumps(content))


def check_pieces(pieces: Sequence[tuple[Any, Any]]) -> None:
    """Refuses vocabularies that no training makes.

    Raises:
      CheckpointError: too many or too long pieces, an empty or repeated one, scores that are no
        finite numbers.
    """
    if not 0 < len(pieces) <= _MAX_PIECES:
        raise CheckpointError(f"expected 1 to {_MAX_PIECES} pieces, found {len(pieces)}.")
    total, seen = 0, set()
    for index, (piece, score) in enumerate(pieces):
        size = len(piece.encode("utf-8", "replace")) if isinstance(piece, str) else 0
        if not 0 < size <= _MAX_PIECE or piece in seen:
            raise CheckpointError(
                f"piece {index}: expected a new text of 1 to {_MAX_PIECE} bytes, found "
                f"{shown(piece)}."
            )
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not (math.isfinite(score) and abs(score) <= _MAX_SCORE):
            raise CheckpointError(
                f"piece {index}: expected a finite score up to {_MAX_SCORE:g}, found "
                f"{shown(score)}."
            )
        total += size
        seen.add(piece)
    if total > _MAX_TEXT:
        raise CheckpointError(f"expected pieces of {_MAX_TEXT} bytes in all, found {total}.")


def _backend(
    pieces: Sequence[tuple[str, float]], unknown: int, *, byte_fallback: bool
) -> Tokenizer:
    def make() -> Tokenizer:
        return Tokenizer(models.Unigram(list(pieces), unk_id=unknown, byte_fallback=byte_fallback))

    return guarded(make, "the vocabulary is of no Unigram model")
