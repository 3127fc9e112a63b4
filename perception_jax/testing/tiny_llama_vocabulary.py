"""A Llama-like SentencePiece BPE vocabulary of 274 pieces, written by hand: nothing of Meta's."""

from __future__ import annotations

from perception_jax.data.tokenization.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    SentencePieceModel,
)

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
MERGED = ("at", "\u2581c", "\u2581cat", "\u2581\u2581", "he")
"""Joined pieces in order of their scores."""
LETTERS = ("\u2581", "a", "c", "t", "s", "h", "e", ">", "=", ">=")


def piece(text: str) -> int:
    """The id of a piece."""
    return MODEL_TEXTS.index(text)


MODEL = SentencePieceModel(
    pieces=(
        *((text, 0.0) for text in ("<unk>", "<s>", "</s>", *BYTES)),
        *((text, -float(rank)) for rank, text in enumerate((*MERGED, *LETTERS))),
    ),
    kinds=(UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(MERGED) + len(LETTERS))),
    byte_fallback=True,
)
MODEL_TEXTS = [text for text, _ in MODEL.pieces]
