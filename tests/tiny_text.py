"""Texts and conversations for a tiny Llama, and the task that trains it on them."""

from __future__ import annotations

import numpy as np

from perception_jax.api import Loaded
from perception_jax.data.packing import PackedTexts, TextTransform
from perception_jax.data.records import Record, Turn
from perception_jax.systems.text.model import choose_template
from perception_jax.systems.text.task import TextTask, TextTaskConfig
from perception_jax.testing import tiny_llama

WORDS = ("the", "cat", "sat", "at", "a", "hat", "chat", "he", "teaches", "cats")
LENGTH = 96


class Texts:
    """A list of records; texts and conversations of different lengths."""

    def __init__(self, records: tuple[Record, ...]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def text(name: str, words: str) -> Record:
    return Record(id=name, text=words)


def chat(name: str, *words: str) -> Record:
    roles = ("user", "assistant")
    turns = (Turn(role=roles[k % 2], text=one) for k, one in enumerate(words))
    return Record(id=name, conversation=tuple(turns))


def corpus(count: int = 12, seed: int = 0) -> Texts:
    """Every third record is a conversation; no two have the same words."""
    rng = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most)))

    return Texts(
        tuple(
            chat(f"chat{k}", words(4), words(6)) if k % 3 == 0 else text(f"text{k}", words(12))
            for k in range(count)
        )
    )


def transform(length: int = LENGTH, *, vocab_size: int | None = None) -> TextTransform:
    tokenizer = tiny_llama.tokenizer()
    return TextTransform(
        tokenizer=tokenizer,
        template=choose_template("auto", tokenizer),
        length=length,
        vocab_size=tokenizer.vocab_size if vocab_size is None else vocab_size,
    )


def data(source: Texts | None = None, *, batch_size: int = 4, **settings) -> PackedTexts:
    source = corpus() if source is None else source
    return PackedTexts(source, transform(), batch_size=batch_size, **settings)


def task(
    base: Loaded | None = None, source: Texts | None = None, *, batch_size: int = 4, **settings
) -> TextTask:
    """Trains all of a fresh tiny Llama, or what `settings` say of `base`."""
    config = TextTaskConfig(batch_size=batch_size, length=LENGTH, chunk=32, **settings)
    return TextTask(
        config,
        tiny_llama.loaded() if base is None else base,
        data(source, batch_size=batch_size),
        scratch=base is None,
    )
