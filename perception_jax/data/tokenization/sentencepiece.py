"""SentencePiece model files: a protocol buffer with pieces, scores and a normaliser.

Hand-written because `protobuf` is no dependency: a parser of the wire format that is bounded by the
file's size, and the writer for vocabularies that come from elsewhere (GGUF). Unigram models (Kudo,
arXiv 1804.10959) are encoded by `tokenizers`, BPE models too (`bpe`).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

from perception_jax.data.tokenization.files import ForeignVocabularyError
from perception_jax.data.tokenization.steps import check_charsmap
from perception_jax.data.tokenization.unigram import UnigramModel, check_pieces
from perception_jax.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces."""
UNIGRAM, BPE = 1, 2
"""Kinds of models."""
_MODELS = {UNIGRAM: "Unigram", BPE: "BPE"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_FIELDS = 1 << 22
"""Of a whole file: a piece has three, and vocabularies up to half a million pieces."""


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """Content of a SentencePiece model file.

    Attributes:
      pieces: texts with their scores, in order of ids.
      kinds: of the pieces: `NORMAL`, `UNKNOWN`, `CONTROL`, `USER_DEFINED`, `UNUSED` or `BYTE`.
      model: `UNIGRAM` or `BPE`.
      charsmap: compiled rules of the normaliser; empty for none.
      dummy_prefix: whether a text is read as if it began with a space.
      byte_fallback: whether unknown characters are spelt in bytes.
      squeeze: whether white space at the ends and repeated spaces are removed.
      suffix: whether a space belongs to the word before it.

    Raises:
      CheckpointError: pieces or rules that no training makes.
    """

    pieces: tuple[tuple[str, float], ...]
    kinds: tuple[int, ...]
    model: int = BPE
    charsmap: bytes = b""
    dummy_prefix: bool = True
    byte_fallback: bool = False
    squeeze: bool = False
    suffix: bool = False

    def __post_init__(self) -> None:
        check_pieces(self.pieces)
        if self.charsmap:
            check_charsmap(self.charsmap)
        if not {*self.kinds} <= {*range(NORMAL, BYTE + 1)}:
            raise CheckpointError(
                f"expected kinds of pieces from {NORMAL} to {BYTE}, found others."
            )
        if self.kinds.count(UNKNOWN) != 1:
            raise CheckpointError(
                f"{len(self.pieces)} pieces: expected one unknown piece, found "
                f"{self.kinds.count(UNKNOWN) or 'none of them the unknown one'}."
            )

    @property
    def unknown(self) -> int:
        """Id of the unknown piece."""
        return self.kinds.index(UNKNOWN)


def read_unigram(name: str, content: bytes) -> UnigramModel:
    """Reads a `spiece.model` of the Unigram kind.

    Raises:
      CheckpointError: the file is damaged, no SentencePiece model, or of another kind.
    """
    found = read_sentencepiece(name, content, UNIGRAM)
    return UnigramModel(
        found.pieces, found.unknown, found.charsmap, found.dummy_prefix, found.byte_fallback
    )


def read_sentencepiece(name: str, content: bytes, model: int) -> SentencePieceModel:
    """Parses the content of a SentencePiece file.

    Args:
      name: of the file, for messages.
      content: the bytes.
      model: the kind that is expected.

    Raises:
      CheckpointError: the file is damaged, no SentencePiece model, or of another kind.
    """
    what = f"Expected a SentencePiece model of the {_MODELS[model]} kind in {name}"
    try:
        found = _parse(content)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error}") from error
    except (ValueError, TypeError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(f"{what}: {error!r:.300}. Fetch the file again.") from error
    if found.model != model:
        raise ForeignVocabularyError(
            f"{what}: model type {found.model}, expected {model} ({_MODELS[model]})."
        )
    return found


def write_sentencepiece(model: SentencePieceModel) -> bytes:
    """The content of a model file that SentencePiece and `read_sentencepiece` read."""
    parts = []
    for (text, score), kind in zip(model.pieces, model.kinds, strict=True):
        body = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind)
        parts.append(_field(1, body))
    trainer = {3: model.model, 24: model.suffix, 35: model.byte_fallback}
    parts.append(_field(2, b"".join(_field(key, int(value)) for key, value in trainer.items())))
    normaliser = _field(1, b"identity") + (_field(2, model.charsmap) if model.charsmap else b"")
    for key, value in ((3, model.dummy_prefix), (4, model.squeeze), (5, True)):
        normaliser += _field(key, int(value))
    return b"".join([*parts, _field(3, normaliser)])


def _parse(content: bytes) -> SentencePieceModel:
    pieces: list[tuple[str, float]] = []
    kinds: list[int] = []
    trainer: dict[int, int | memoryview] = {}
    normaliser: dict[int, int | memoryview] = {}
    reader = _Reader()
    for number, value in reader.fields(memoryview(content)):
        if number == 1:  # SentencePiece
            piece = dict(reader.fields(value))
            kinds.append(piece.get(3, NORMAL))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append((_blob(piece[1]).decode("utf-8"), score))
        elif number == 2:  # TrainerSpec
            trainer = dict(reader.fields(value))
        elif number == 3:  # NormalizerSpec
            normaliser = dict(reader.fields(value))
    return SentencePieceModel(
        pieces=tuple(pieces),
        kinds=tuple(kinds),
        model=trainer.get(3, UNIGRAM),
        charsmap=_blob(normaliser.get(2, memoryview(b""))),
        dummy_prefix=bool(normaliser.get(3, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
        squeeze=bool(normaliser.get(4, 1)),
        suffix=bool(trainer.get(24, 0)),
    )


def _blob(value: int | memoryview) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text was expected")
    return bytes(value)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _number(number << 3 | _VARINT) + _number(value)
    return _number(number << 3 | _BYTES) + _number(len(value)) + value


def _number(value: int) -> bytes:
    """A varint."""
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*result, value])


class _Reader:
    """Reads messages of one file, up to a number of fields in all."""

    def __init__(self) -> None:
        self.count = 0

    def fields(self, data: int | memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Number and value of each field of a message; ValueError if it is none."""
        if isinstance(data, int):
            raise ValueError(f"the number {data} in the place of a message")
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
