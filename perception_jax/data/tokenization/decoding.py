"""Ids to text, all at once or as they are generated.

Tokens stand for bytes. Of a stream, the bytes of a character that is not whole yet are held back;
bytes that are no UTF-8 become U+FFFD, how many depends on the reference: one for a truncated
character (byte-level vocabularies, as `tokenizers`), one for each byte of the whole run of byte
tokens (`tokenizers`' byte fallback), one for each invalid byte (SentencePiece). What a stream gives
in all is what the reference decodes from all ids; where it is decided only by later bytes of a run,
the run is held back.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from perception_jax.data.tokenization.bpe import byte_values
from perception_jax.data.tokenization.sentencepiece import BYTE, CONTROL, SentencePieceModel
from perception_jax.data.tokenization.steps import SPACE

_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
_INVALID = "\ufffd"


@runtime_checkable
class TextStream(Protocol):
    """Decoder of ids that arrive one after the other."""

    def push(self, ids: Iterable[int | np.integer]) -> str:
        """The text that is certain by now and was not returned before."""

    def close(self) -> str:
        """The rest, with U+FFFD for what is no whole character."""


class ByteLevelStream:
    """Decoder of byte-level vocabularies (GPT-2, SmolLM2, Qwen2).

    Args:
      token: text of an id; None for one that no token has, which decodes to nothing.
      skip: ids that are left out.
    """

    def __init__(self, token: Callable[[int], str | None], skip: Collection[int]) -> None:
        self._token, self._skip = token, skip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int | np.integer]) -> str:
        """See `TextStream`."""
        tokens = (self._token(number) for number in ids if number not in self._skip)
        return self._decoder.decode(b"".join(map(_bytes_of, filter(None, tokens))))

    def close(self) -> str:
        """See `TextStream`."""
        return self._decoder.decode(b"", final=True)


class FallbackStream:
    """Decoder of `tokenizers` for vocabularies with byte fallback (llava-hf).

    Args:
      token, skip: as for `ByteLevelStream`.
      strip: whether one space at the beginning of the text is dropped.
    """

    def __init__(
        self, token: Callable[[int], str | None], skip: Collection[int], *, strip: bool
    ) -> None:
        self._token, self._skip, self._strip = token, skip, strip
        self._run = bytearray()

    def push(self, ids: Iterable[int | np.integer]) -> str:
        """See `TextStream`."""
        parts = []
        for number in ids:
            token = None if number in self._skip else self._token(number)
            if token is None:
                continue
            if _BYTE_PIECE.fullmatch(token):
                self._run.append(int(token[3:5], 16))
            else:
                parts += [self._ended_run(), token.replace(SPACE, " ")]
        return self._stripped("".join(parts))

    def close(self) -> str:
        """See `TextStream`."""
        return self._stripped(self._ended_run())

    def _ended_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _INVALID * len(run)

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


class PieceStream:
    """SentencePiece's own decoder of one run of pieces.

    Args:
      model: pieces and kinds.
      prefix: whether a space at the beginning of the text is dropped.
    """

    def __init__(self, model: SentencePieceModel, *, prefix: bool) -> None:
        self._model, self._prefix = model, prefix
        self._run = bytearray()

    def push(self, ids: Iterable[int | np.integer]) -> str:
        """See `TextStream`."""
        parts = []
        for number in ids:
            piece, kind = self._model.pieces[number][0], self._model.kinds[number]
            if kind == BYTE:
                self._run.append(int(piece[3:5], 16))
                parts.append(self._characters(final=False))
            else:
                parts.append(self._characters(final=True))
                self._prefix = self._prefix and not any(parts)
                if kind == CONTROL:
                    continue
                if self._prefix and piece.startswith(SPACE):
                    piece, self._prefix = piece[1:], False
                parts.append(piece.replace(SPACE, " "))
        text = "".join(parts)
        self._prefix = self._prefix and not text
        return text

    def close(self) -> str:
        """See `TextStream`."""
        return self._characters(final=True)

    def _characters(self, *, final: bool) -> str:
        """The characters of the run so far; `final` if no more bytes follow."""
        parts = []
        while self._run:
            lead = self._run[0]
            size = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
            if len(self._run) < size and not final:
                break
            try:
                parts.append(self._run[:size].decode())
            except UnicodeDecodeError:
                parts.append(_INVALID)
                size = 1
            del self._run[:size]
        return "".join(parts)


@dataclasses.dataclass(frozen=True)
class SlowPieces:
    """How `transformers`' slow Llama tokenizers cut ids into runs of pieces.

    Attributes:
      model: the pieces.
      special: text of each special token that is a piece, by id.
      added: text of each token behind the pieces, by id.
      skip: ids that are left out on demand: special tokens.
      legacy: as `legacy=True`, where SentencePiece drops the space at the beginning of a run, and a
        special token that is kept puts one there; else a run loses that of its first piece.
    """

    model: SentencePieceModel
    special: Mapping[int, str]
    added: Mapping[int, str]
    skip: Collection[int]
    legacy: bool

    def decode(self, ids: Iterable[int]) -> str:
        """The text of all ids, special tokens among it."""
        texts: list[str] = []
        run: list[int] = []
        for number in ids:
            if number not in self.added:
                run += [number] if 0 <= number < len(self.model.pieces) else []
                continue
            texts += [self._run_text(run)] if run else []
            texts.append(self.added[number])
            run = []
        texts += [self._run_text(run)] if run else []
        return " ".join(texts)

    def stream(self) -> SlowStream:
        """A decoder without special tokens."""
        return SlowStream(self)

    def new_run(self) -> PieceStream:
        """Decoder of the pieces of one run."""
        return PieceStream(self.model, prefix=self.legacy and self.model.dummy_prefix)

    def without_space(self, pieces: list[int], text: str) -> str:
        """The text of the first pieces of a run, without the space that starts them."""
        starts = bool(pieces) and self.model.pieces[pieces[0]][0].startswith(SPACE)
        return text[1:] if starts and not self.legacy else text

    def _run_text(self, run: list[int]) -> str:
        parts: list[str] = []
        pieces: list[int] = []
        after_special = False
        for index, number in enumerate(run):
            if number not in self.special:
                pieces.append(number)
                after_special = False
                continue
            parts += [" "] if self.legacy and index and not after_special else []
            parts += [self._pieces_text(pieces, first=index == len(pieces)), self.special[number]]
            pieces, after_special = [], True
        parts.append(self._pieces_text(pieces, first=len(pieces) == len(run)))
        return "".join(parts)

    def _pieces_text(self, pieces: list[int], *, first: bool) -> str:
        stream = self.new_run()
        text = stream.push(pieces) + stream.close()
        return self.without_space(pieces, text) if first else text


class SlowStream:
    """Decoder of `SlowPieces` without special tokens: runs of pieces and added tokens, with one
    space between."""

    def __init__(self, pieces: SlowPieces) -> None:
        self._pieces = pieces
        self._run: PieceStream | None = None
        self._begun = False

    def push(self, ids: Iterable[int | np.integer]) -> str:
        """See `TextStream`."""
        parts: list[str] = []
        pieces: list[int] = []
        for number in map(int, ids):
            if number in self._pieces.skip:
                continue
            if number in self._pieces.added:
                parts += [self._text(pieces), self.close(), " " * self._begun]
                parts.append(self._pieces.added[number])
                self._begun, pieces = True, []
            elif 0 <= number < len(self._pieces.model.pieces):
                pieces.append(number)
        return "".join([*parts, self._text(pieces)])

    def close(self) -> str:
        """See `TextStream`."""
        run, self._run = self._run, None
        return "" if run is None else run.close()

    def _text(self, pieces: list[int]) -> str:
        """The text of further pieces of a run."""
        if not pieces:
            return ""
        if self._run is not None:
            return self._run.push(pieces)
        before = " " * self._begun
        self._begun, self._run = True, self._pieces.new_run()
        return before + self._pieces.without_space(pieces, self._run.push(pieces))


def _bytes_of(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary; of another text, its own."""
    values = byte_values()
    try:
        return bytes(map(values.__getitem__, token))
    except KeyError:
        return token.encode()
