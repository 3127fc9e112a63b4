"""Unigram tokenizers (Kudo, arXiv 1804.10959) on the `tokenizers` package, from checked parts only.

The compiled code trusts its files: a normaliser's table that points outside of itself, or a piece
of a megabyte, ends the process. Everything is checked here before it is handed over, and of a
`tokenizer.json` only steps of known kinds are taken.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from perception_jax.data.tokenization.files import ForeignVocabularyError, guarded
from perception_jax.errors import CheckpointError
from perception_jax.settings import FLAG, Choice, Integer, Settings, Text, shown

SPACE = "▁"
"""SentencePiece's symbol of a space."""

_MAX_PIECES, _MAX_PIECE, _MAX_TEXT = 1 << 19, 512, 1 << 23
"""Pieces, bytes of one, bytes of all."""
_MAX_SCORE = 1e9
_MAX_STEPS = 16
_PATTERNS = (" {2,}", r"\s+", " +", "▁{2,}")
"""Regular expressions in use; others can take exponential time."""
_SCHEMES = Choice(("always", "never", "first"))


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
            check_charsmap(self.charsmap)


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
    steps = {
        "normalizer": [_normalizer(x) for x in _steps(content, "normalizer", "normalizers")],
        "pre_tokenizer": [
            _pre_tokenizer(x) for x in _steps(content, "pre_tokenizer", "pretokenizers")
        ],
    }
    if sum(step.get("type") == "Precompiled" for step in steps["normalizer"]) > 1:
        raise CheckpointError(f"{content.where}: expected one table of the normaliser.")
    tokenizer = _backend(pieces, unknown, byte_fallback=fallback)
    whole = json.loads(Tokenizer(models.WordLevel({}, unk_token="")).to_str()) | {
        "normalizer": {"type": "Sequence", "normalizers": steps["normalizer"]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps["pre_tokenizer"]},
    }
    what = f"{content.where}: the steps before the model do not work"
    parts = guarded(lambda: Tokenizer.from_str(json.dumps(whole)), what)
    tokenizer.normalizer = parts.normalizer
    tokenizer.pre_tokenizer = parts.pre_tokenizer
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


def check_charsmap(content: bytes) -> None:
    """Refuses a normaliser's table that would read outside of itself.

    The table is a double array (Aoe, 1989, as in darts-clone): a unit at position i with a label
    goes on to node n = i ^ offset, whose children are at n ^ byte, and whose value, if it has one,
    is at n; the value is a position in the texts behind the array.

    Raises:
      CheckpointError: a damaged table.
    """
    size = int.from_bytes(content[:4], "little")
    if len(content) < 8 or size % 4 or not 4 <= size <= len(content) - 4:
        raise CheckpointError(
            f"the normaliser's table: expected an array within {len(content)} bytes, found one of "
            f"{size} bytes."
        )
    units = np.frombuffer(content, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(content, np.uint8, offset=4 + size)
    nodes = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    used = units < 2**31  # the others are values
    used[0] = True
    leaves = nodes[used & (units >> 8 & 1 == 1)]
    inside = bool(((nodes[used] | 0xFF) < len(units)).all())
    if inside:
        values = units[leaves] & 0x7FFFFFFF
        inside = bool((values < len(texts)).all() and ((texts[values] & 0xC0) != 0x80).all())
    try:
        texts.tobytes().decode("utf-8")
    except UnicodeDecodeError:
        inside = False
    if not inside:
        raise CheckpointError(
            "the normaliser's table: expected an array that stays within itself, found one that "
            "points outside. Fetch the file again."
        )


def _backend(
    pieces: Sequence[tuple[str, float]], unknown: int, *, byte_fallback: bool
) -> Tokenizer:
    def make() -> Tokenizer:
        return Tokenizer(models.Unigram(list(pieces), unk_id=unknown, byte_fallback=byte_fallback))

    return guarded(make, "the vocabulary is of no Unigram model")


def _steps(content: Settings, key: str, inner: str) -> Iterator[Settings]:
    """The steps of a pipeline, without the sequences around them."""
    pending, count = [content.content.get(key)], 0
    while pending:
        value = pending.pop(0)
        if value is None:
            continue
        step = Settings(value, f"{content.where}: {key}", error=CheckpointError)
        if step.content.get("type") == "Sequence":
            items = step.content.get(inner)
            if not isinstance(items, list):
                raise CheckpointError(f"{step.where}: {inner}: expected a list.")
            pending = [*items, *pending]
        else:
            yield step
        count += 1
        if count + len(pending) > _MAX_STEPS:
            raise CheckpointError(f"{step.where}: expected at most {_MAX_STEPS} steps, found more.")


def _normalizer(step: Settings) -> dict[str, Any]:
    kind = step.get("type", Text(64))
    if kind in ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents"):
        return {"type": kind}
    if kind == "Strip":
        sides = ("strip_left", "strip_right")
        return {"type": kind} | {side: step.get(side, FLAG, default=True) for side in sides}
    if kind == "Prepend":
        return {"type": kind, "prepend": step.get("prepend", Text(1))}
    if kind == "Precompiled":
        text = step.get("precompiled_charsmap", Text(1 << 24))
        try:
            check_charsmap(base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise CheckpointError(f"{step.where}: expected base64: {error}.") from error
        return {"type": kind, "precompiled_charsmap": text}
    if kind == "Replace":
        return {"type": kind, **_replacement(step)}
    raise _unknown(step, kind)


def _replacement(step: Settings) -> dict[str, Any]:
    """A pattern and what replaces it, which is no longer: steps must not let texts grow."""
    pattern, content = step.section("pattern").content, step.get("content", Text(64))
    if pattern.keys() == {"Regex"} and pattern["Regex"] in _PATTERNS and len(content) <= 1:
        return {"pattern": dict(pattern), "content": content}
    text = pattern.get("String")
    if pattern.keys() == {"String"} and isinstance(text, str) and len(content) <= len(text) <= 64:
        return {"pattern": {"String": text}, "content": content}
    raise _unknown(step, "Replace")


def _pre_tokenizer(step: Settings) -> dict[str, Any]:
    kind = step.get("type", Text(64))
    if kind in ("WhitespaceSplit", "Whitespace"):
        return {"type": kind}
    if kind == "Metaspace":
        prefix = step.get("add_prefix_space", FLAG, default=True)
        replacement = step.get("replacement", Choice((SPACE,)))
        scheme = step.get("prepend_scheme", _SCHEMES, default="always" if prefix else "never")
        split = step.get("split", FLAG, default=True)
        return {
            "type": kind,
            "replacement": replacement,
            "prepend_scheme": scheme,
            "split": split,
        }
    raise _unknown(step, kind)


def _unknown(step: Settings, kind: str) -> ForeignVocabularyError:
    found: Mapping[str, Any] = step.content
    return ForeignVocabularyError(
        f"{step.where}: expected a supported step, found {kind}: {shown(found)}."
    )
