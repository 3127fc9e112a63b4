"""Reading a SentencePiece model file: a protocol buffer with pieces, scores and a normaliser.

Only what a Unigram model (Kudo, arXiv 1804.10959) needs is read, by a parser of the wire format
that is bounded by the file's size. `tokenizers` then does the encoding.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from perception_jax.errors import CheckpointError

SPACE = "▁"
_UNIGRAM, _UNKNOWN = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclasses.dataclass(frozen=True)
class UnigramModel:
    """Attributes:
    pieces: with their logarithmic probabilities, in order of ids.
    unknown: id of the unknown piece.
    charsmap: compiled rules of the normaliser; empty for none.
    dummy_prefix: whether a text is read as if it began with a space.
    byte_fallback: whether unknown characters are spelt in bytes.
    """

    pieces: tuple[tuple[str, float], ...]
    unknown: int
    charsmap: bytes
    dummy_prefix: bool
    byte_fallback: bool


def read_unigram(name: str, content: bytes) -> UnigramModel:
    """Parses the content of a `spiece.model`; `name` is for messages.

    Raises:
      CheckpointError: the file is damaged, no SentencePiece model, or not of the Unigram kind.
    """
    try:
        return _parse(memoryview(content))
    except (ValueError, TypeError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(
            f"Expected a SentencePiece model of the Unigram kind in {name}: {error!r}. Fetch the "
            "file again."
        ) from error


def unigram_tokenizer(model: UnigramModel) -> Tokenizer:
    """A `tokenizers` pipeline that encodes as SentencePiece does; it adds no special tokens."""
    pieces = list(model.pieces)
    tokenizer = Tokenizer(
        models.Unigram(pieces, unk_id=model.unknown, byte_fallback=model.byte_fallback)
    )
    charsmap = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    tokenizer.normalizer = normalizers.Sequence(
        [*charsmap, normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    )
    scheme = "always" if model.dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(SPACE, prepend_scheme=scheme)
    return tokenizer


def _parse(data: memoryview) -> UnigramModel:
    pieces: list[tuple[str, float]] = []
    unknown = None
    kind, byte_fallback = _UNIGRAM, False
    charsmap, dummy_prefix = b"", True
    for number, value in _fields(data):
        if number == 1:  # SentencePiece
            piece = dict(_fields(value))
            if piece.get(3, 1) == _UNKNOWN:
                unknown = len(pieces)
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((_blob(piece[1]).decode("utf-8"), score))
        elif number == 2:  # TrainerSpec
            trainer = dict(_fields(value))
            kind, byte_fallback = trainer.get(3, _UNIGRAM), bool(trainer.get(35, 0))
        elif number == 3:  # NormalizerSpec
            normaliser = dict(_fields(value))
            charsmap = _blob(normaliser.get(2, memoryview(b"")))
            dummy_prefix = bool(normaliser.get(3, 1))
    if kind != _UNIGRAM:
        raise ValueError(f"model type {kind}, expected {_UNIGRAM} (Unigram)")
    if unknown is None:
        raise ValueError(f"{len(pieces)} pieces, none of them the unknown one")
    return UnigramModel(tuple(pieces), unknown, charsmap, dummy_prefix, byte_fallback)


def _blob(value: int | memoryview) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text was expected")
    return bytes(value)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
        else:
            if wire == _BYTES:
                size, position = _varint(data, position)
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                raise ValueError(f"wire type {wire} at byte {position}")
            if size > len(data) - position:
                raise ValueError(f"a field of {size} bytes at byte {position} of {len(data)}")
            value = data[position : position + size]
            position += size
        yield number, value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"an integer without an end at byte {position}")
