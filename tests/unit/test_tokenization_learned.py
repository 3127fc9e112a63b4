"""Vocabularies learned from texts: deterministic, reversible, whole words, bounded."""

from __future__ import annotations

import pytest

from perception_jax.data.tokenization import byte_tokenizer, learned_tokenizer
from perception_jax.errors import ConfigError

TEXTS = ["a red fox above a castle", "a fox and a red castle"] * 3


def test_the_same_texts_give_the_same_vocabulary_and_texts_come_back():
    found = learned_tokenizer(TEXTS, 400)
    assert found.files == learned_tokenizer(iter(TEXTS), 400).files
    assert byte_tokenizer().vocab_size < found.vocab_size <= 400
    for text in (*TEXTS, "Übergröße\n(a) 17 🦊", ""):
        assert found.decode(found.encode(text).ids) == text
    assert len(found.encode(TEXTS[0]).ids) == 6  # a token for each word
    assert len(learned_tokenizer(TEXTS, 259).encode("fox").ids) == 3


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"at least 259, .*found 258"):
        learned_tokenizer(TEXTS, 258)
