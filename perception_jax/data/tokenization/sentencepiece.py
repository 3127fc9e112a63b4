"""Reads a SentencePiece model file: a protocol buffer with pieces, scores and a normaliser.

Only what a Unigram model (Kudo, arXiv 1804.10959) needs is read, by a parser of the wire format
that is bounded by the file's size. `tokenizers` then does the encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from perception_jax.data.tokenization.unigram import UnigramModel
from perception_jax.errors import CheckpointError

_UNIGRAM, _UNKNOWN = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_FIELDS = 1 << 22
"""Of a whole file: a piece has three, and vocabularies up to half a million pieces."""


def read_unigram(name: str, content: bytes) -> UnigramModel:
    """Parses the content of a `spiece.model`; `name` is for messages.

    Raises:
      CheckpointError: the file is damaged, no SentencePiece model, or not of the Unigram kind.
    """
    try:
        return _parse(content)
    except (ValueError, TypeError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(
            f"Expected a SentencePiece model of the Unigram kind in {name}: {error!r:.300}. Fetch "
            "the file again."
        ) from error


def _parse(content: bytes) -> UnigramModel:
    pieces: list[tuple[str, float]] = []
    unknown = None
    kind, byte_fallback = _UNIGRAM, False
    charsmap, dummy_prefix = b"", True
    reader = _Reader()
    for number, value in reader.fields(memoryview(content)):
        if number == 1:  # SentencePiece
            piece = dict(reader.fields(value))
            if piece.get(3, 1) == _UNKNOWN:
                unknown = len(pieces)
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((_blob(piece[1]).decode("utf-8"), score))
        elif number == 2:  # TrainerSpec
            trainer = dict(reader.fields(value))
            kind, byte_fallback = trainer.get(3, _UNIGRAM), bool(trainer.get(35, 0))
        elif number == 3:  # NormalizerSpec
            normaliser = dict(reader.fields(value))
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


class _Reader:
    """Reads messages of one file, up to a number of fields in all."""

    def __init__(self) -> None:
        self.count = 0

    def fields(self, data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Number and value of each field of a message."""
        position = 0
        while position < len(data):
            self.count += 1
            if self.count > _MAX_FIELDS:
                raise ValueError(f"more than {_MAX_FIELDS} fields")
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
