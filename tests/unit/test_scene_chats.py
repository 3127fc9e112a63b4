"""Conversations about scenes: what is asked and answered, pairs, letters, floors, bad settings."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest

from perception_jax.data.records import MMVP_PATTERNS
from perception_jax.data.scenes import questions
from perception_jax.data.scenes.chats import (
    CAPTIONS,
    IMAGE,
    LETTER,
    NAMING,
    ChatConfig,
    PairQuestions,
    SceneConversations,
    SingleQuestions,
    blank,
    question_only,
)
from perception_jax.data.sources.combine import Mapped
from perception_jax.errors import ConfigError

COUNT = 32


def read(source) -> list:
    return [source[k] for k in range(len(source))]


def said(record) -> list[tuple[str, str]]:
    turns = record.conversation
    assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    return [(a.text, b.text) for a, b in zip(turns[::2], turns[1::2], strict=True)]


def offered(question: str) -> list[str]:
    """The options of a question by letter."""
    text = question.removesuffix(f"\n{LETTER}")
    return text.partition("(a) ")[2].split(" (b) ")


def test_a_conversation_has_a_caption_and_some_questions_of_all_kinds():
    config = ChatConfig(turns=3, text_every=4, letters=0.5)
    records = read(SceneConversations(config, seed=1, length=COUNT))
    again = SceneConversations(config, seed=1, length=COUNT)[5]
    assert again.conversation == records[5].conversation
    np.testing.assert_array_equal(again.image, records[5].image)
    alone = [record for record in records if not record.images]
    assert [records.index(record) % 4 for record in alone] == [3] * (COUNT // 4)
    assert all(IMAGE not in turn.text for record in alone for turn in record.conversation)
    letters = words = 0
    for record in records:
        if not record.images:
            continue
        (first, caption), *rest = said(record)
        assert first.startswith(IMAGE)
        assert caption
        assert 1 <= len(rest) <= 3
        for question, answer in rest:
            if question.endswith(LETTER):
                letters += 1
                assert answer in questions.LETTERS
            elif "(a)" in question:
                words += 1
                assert answer in offered(question)
    assert letters > 5
    assert words > 5
    some = SceneConversations(ChatConfig(caption=0.5, text_every=0), seed=1, length=COUNT)
    first = [said(record)[0][0] in CAPTIONS for record in read(some)]
    assert 0.25 < np.mean(first) < 0.75
    bare = ChatConfig(caption=0.0, turns=1, text_every=0, letters=1.0)
    for record in read(SceneConversations(bare, seed=1, length=6)):
        ((question, _),) = said(record)
        assert question.startswith(IMAGE)


def test_images_of_both_sides_of_a_pair_follow_each_other():
    config = ChatConfig(turns=1, caption=0.0, text_every=0, pairs=4, letters=1.0)
    records = read(SceneConversations(config, seed=0, length=24))
    pairs = [records[k] for k in range(24) if k % 8 < 4]
    assert all(record.id.startswith("pair-") for record in pairs)
    assert not any(records[k].id.startswith("pair-") for k in range(24) if k % 8 >= 4)
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        (question, answer), (other, opposite) = *said(first), *said(second)
        assert question == other
        assert {answer, opposite} == set(questions.LETTERS)
        assert (first.image != second.image).any()


def test_pair_questions_have_each_pattern_as_often_and_both_letters():
    config = ChatConfig(split="test").scenes()
    records = read(PairQuestions(config, seed=3, per_pattern=6))
    kinds = collections.Counter(record.questions[0].kind for record in records)
    assert kinds == dict.fromkeys(MMVP_PATTERNS, 12)
    for first, second in zip(records[::2], records[1::2], strict=True):
        assert {said(first)[0][1], said(second)[0][1]} == set(questions.LETTERS)
    first_letters = collections.Counter(said(record)[0][1] for record in records[::2])
    assert min(first_letters.values()) > 15


@pytest.mark.parametrize("caption", [0.0, 1.0])
def test_no_turn_gives_a_later_answer_away(caption):
    """A model that can read an answer does not learn to see it."""
    config = ChatConfig(
        turns=4, independent=True, caption=caption, detailed=0.5, text_every=0, pairs=4
    )
    records = read(SceneConversations(config, seed=2, length=96))
    kinds = [[question.kind for question in record.questions] for record in records]
    captioned = [said(record)[0][0] in CAPTIONS for record in records]
    pairs = [record.id.startswith("pair-") for record in records]
    assert captioned == [caption == 1.0 and not pair for pair in pairs]
    assert not any(
        NAMING & set(asked[not seen :]) for asked, seen in zip(kinds, captioned, strict=True)
    )
    begun = {asked[0] for asked, pair in zip(kinds, pairs, strict=True) if asked and not pair}
    assert (begun <= NAMING) if not caption else not begun & NAMING
    assert max(len(asked) for asked in kinds) == 4
    for record, asked in zip(records, kinds, strict=True):
        assert len(set(asked)) == len(asked)
        assert not ("orientation" in asked and "facing" in asked)
        if said(record)[0][0] == CAPTIONS[1]:
            assert not asked


def test_single_questions_are_those_of_a_conversation():
    config = ChatConfig(split="test", letters=0.5, pairs=2)
    source = SingleQuestions(config, seed=3, length=5, each=4)
    records = read(source)
    assert len(records) == 20
    assert len({record.id for record in records}) == 20
    plain = dataclasses.replace(config, turns=4, caption=0.0, text_every=0)
    chats = SceneConversations(plain, seed=3, length=5)
    for k, record in enumerate(records):
        chat = chats[k // 4]
        number = k % 4 % len(chat.questions)
        ((question, answer),) = said(record)
        asked, expected = said(chat)[number]
        assert question == IMAGE + asked.removeprefix(IMAGE)
        assert answer == expected
        assert record.questions == (chat.questions[number],)
        np.testing.assert_array_equal(record.image, chat.image)
    with pytest.raises(IndexError):
        source[20]
    with pytest.raises(ConfigError, match="at least 1"):
        SingleQuestions(config, seed=3, length=5, each=0)


def test_single_questions_are_of_all_kinds():
    config = ChatConfig(split="test", letters=0.5, pairs=2, text_every=0)
    source = SingleQuestions(config, seed=3, length=16, each=4)
    records = read(source)
    assert len({record.id for record in records}) == len(records) == 64
    chats = SceneConversations(config, seed=3, length=16)
    for k, record in enumerate(records):
        ((question, answer),) = said(record)
        assert question.startswith(IMAGE)
        (asked,) = record.questions
        assert answer in (asked.answer, *questions.LETTERS)
        np.testing.assert_array_equal(record.image, chats[k // 4].image)
    kinds = {record.questions[0].kind for record in records}
    assert kinds > NAMING
    assert kinds & set(MMVP_PATTERNS)


def test_floors_keep_the_question_and_its_answer():
    source = PairQuestions(ChatConfig().scenes(), seed=0, per_pattern=1)
    for k in range(4):
        record, grey, bare = source[k], Mapped(source, blank)[k], question_only(source[k])
        assert grey.conversation == record.conversation
        assert (grey.image == 128).all()
        assert grey.image.shape == record.image.shape
        assert not bare.images
        assert said(bare) == [(said(record)[0][0].removeprefix(IMAGE), said(record)[0][1])]


@pytest.mark.parametrize(
    "wrong",
    [
        {"turns": 0, "caption": 0.5},
        {"pairs": 9},
        {"caption": 1.5},
        {"letters": 1.5},
        {"text_every": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ChatConfig(**wrong)
