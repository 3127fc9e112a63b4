"""Texts and conversations in rows: tokens, labels, which share a row, and what cannot be used."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.data.packing import IGNORE, KEYS, pack
from perception_jax.data.records import Record, Turn
from perception_jax.data.tokenization import byte_tokenizer
from perception_jax.errors import DataError
from perception_jax.testing import tiny_llama
from tests.tiny_text import LENGTH, Texts, chat, corpus, data, text, transform


def test_rows_by_hand():
    lengths = np.array([3, 7, 2, 5, 5, 10, 1])
    rows = pack(lengths, 10)
    found = sorted(sorted(lengths[rows == row].tolist()) for row in range(rows.max() + 1))
    assert found == [[1, 2], [3, 7], [5, 5], [10]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(0, 3))
def test_every_text_has_a_row_with_room(lengths, seed):
    lengths = np.array(lengths)
    rows = pack(lengths, 40, seed=seed)
    filled = np.bincount(rows, weights=lengths)
    assert filled.max() <= 40
    assert (filled > 0).all()
    # Best fit leaves at most one row half empty.
    assert (filled <= 20).sum() <= 1
    np.testing.assert_array_equal(rows, pack(lengths, 40, seed=seed))


def test_texts_of_one_length_are_mixed_by_the_seed():
    lengths = np.full(64, 10)
    rows = [pack(lengths, 40, seed=seed) for seed in (0, 1)]
    assert not np.array_equal(*rows)
    assert [len(set(found.tolist())) for found in rows] == [16, 16]


def test_a_text_is_predicted_with_its_end_token():
    tokenizer = tiny_llama.tokenizer()
    found = transform().encode(text("a", "the cat"))
    ids = [*tokenizer("the cat").tolist(), tokenizer.end_id]
    assert found.ids.tolist() == found.labels.tolist() == ids
    assert not found.cut
    short = transform(4).encode(text("a", "the cat"))
    assert short.ids.tolist() == ids[:4]
    assert short.cut


def test_of_a_conversation_the_answer_alone_is_predicted():
    tokenizer = tiny_llama.tokenizer()
    found = transform().encode(chat("a", "the hat", "a cat"))
    counted = found.labels != IGNORE
    assert tokenizer.decode(found.ids[counted]).strip() == "a cat <|im_end|>"
    assert tokenizer.decode(found.ids).count("the hat") == 1
    assert found.ids[counted][-1] == tokenizer.token_id("<|im_end|>")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record(id="x", text=" \n"), 'expected a "text" or a "conversation", found neither'),
        (Record(id="x"), "found neither"),
        (Record(id="x", images=(b"",), text="a"), "expected text alone, found 1 images"),
        (chat("x", "the cat"), "expected something to predict within 96 tokens, found nothing"),
        (chat("x", "cat " * 99, "a"), "expected something to predict"),
        (
            Record(id="x", conversation=(Turn(role="user", text="a"),) * 2),
            "expected turn 1 from the assistant",
        ),
    ],
)
def test_what_cannot_be_used_says_why(record, message):
    with pytest.raises(DataError, match=message):
        transform().encode(record)


def test_tokens_of_another_model_are_refused():
    with pytest.raises(DataError, match=r"expected tokens below 200.* found 2\d\d"):
        transform(vocab_size=200).encode(text("a", "the cat"))


def test_the_arrays_of_a_row():
    records = Texts((text("a", "the cat sat"), chat("b", "a", "the hat"), text("c", "he")))
    packed = data(records)
    ((row,),) = packed.parts(1)
    arrays = dict(zip(KEYS, row, strict=True))
    order = {"a": 0, "b": 1, "c": 2}
    loaded = next(iter(packed.loader()))
    names = loaded["id"][0].split()
    at = 0
    for number, name in enumerate(names, 1):
        own = transform().encode(records[order[name]])
        place = slice(at, at + len(own.ids))
        np.testing.assert_array_equal(arrays["ids"][place], own.ids)
        np.testing.assert_array_equal(arrays["label"][place][1:], own.labels[1:])
        assert arrays["label"][at] == IGNORE
        np.testing.assert_array_equal(arrays["segment"][place], number)
        np.testing.assert_array_equal(arrays["position"][place], np.arange(len(own.ids)))
        at = place.stop
    assert sorted(names) == ["a", "b", "c"]
    for name, value in (("ids", 0), ("label", IGNORE), ("segment", 0), ("position", 0)):
        assert (arrays[name][at:] == value).all()
        np.testing.assert_array_equal(loaded[name][0], arrays[name])
    assert packed.counts.tokens == at
    assert packed.counts.padding == 1 - at / LENGTH


def test_one_record_a_row_without_packing():
    packed, plain = data(corpus(20)), data(corpus(20), packed=False)
    assert plain.counts.rows == plain.counts.records == 20
    assert packed.counts.rows < 20
    assert packed.counts.tokens == plain.counts.tokens
    assert packed.counts.padding < plain.counts.padding
    assert "20 texts of" in str(packed.counts)
    filled = list(plain.parts(8))
    assert [part.shape for part in filled] == [(8, 4, LENGTH)] * 3
    label = KEYS.index("label")
    assert (filled[-1][4:, label] == IGNORE).all()
    assert (filled[-1][:4, label] != IGNORE).any(axis=1).all()


def batches(dataset, count):
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


def test_batches_do_not_depend_on_the_hosts():
    packed = data(corpus(40))
    whole = batches(packed.loader(), 6)
    parts = [batches(data(corpus(40)).loader(host=(k, 2)), 6) for k in (0, 1)]
    for batch, even, odd in zip(whole, *parts, strict=True):
        assert_same({name: value[0::2] for name, value in batch.items()}, even)
        assert_same({name: value[1::2] for name, value in batch.items()}, odd)


def test_batches_do_not_depend_on_the_workers():
    packed = data(corpus(40), workers=2)
    with contextlib.closing(iter(packed.loader())) as iterator:
        loaded = [next(iterator) for _ in range(3)]
    assert packed.counts == data(corpus(40)).counts
    for batch, other in zip(loaded, batches(data(corpus(40)).loader(), 3), strict=True):
        assert_same(batch, other)


def test_an_epoch_has_every_record_once_and_the_next_another_order():
    packed = data(corpus(40), batch_size=1)
    rows = packed.counts.rows
    found = [str(batch["id"][0]) for batch in batches(packed.loader(), 2 * rows)]
    first, second = found[:rows], found[rows:]
    assert sorted(" ".join(first).split()) == sorted(one.id for one in corpus(40).records)
    assert sorted(first) == sorted(second)
    assert first != second


def test_an_iterator_goes_on_from_its_state():
    packed = data(corpus(40))
    iterator = iter(packed.loader())
    for _ in range(5):
        next(iterator)
    again = iter(data(corpus(40)).loader())
    again.set_state(iterator.get_state())
    for _ in range(4):
        assert_same(next(iterator), next(again))


def test_bad_records_are_left_out_counted_and_named(caplog):
    records = (*corpus(11).records, Record(id="blank", text=" "))
    packed = data(Texts(records), max_bad_fraction=0.2)
    with caplog.at_level(logging.INFO):
        counts = packed.counts
    assert (counts.records, counts.skipped) == (11, 1)
    assert "skipped record 'blank': expected a \"text\"" in caplog.text
    assert "1 cannot be used" in caplog.text
    ids = " ".join(str(one) for batch in batches(packed.loader(), 4) for one in batch["id"])
    assert "blank" not in ids
    with pytest.raises(DataError, match=r"2 of 2 records could not be used.*max_bad_fraction"):
        _ = data(Texts((Record(id="a"), Record(id="b")))).counts


def test_what_is_longer_than_a_row_is_cut_and_counted():
    packed = data(Texts((text("long", "teaches " * 60), text("short", "a hat"))))
    assert (packed.counts.cut, packed.counts.rows) == (1, 2)
    assert "1 texts are cut" in str(packed.counts)


def test_a_tokenizer_of_bytes():
    tokenizer = byte_tokenizer()
    words = "Is it a café?\n"
    ids = tokenizer(words)
    assert len(ids) == len(words.encode())
    assert tokenizer.decode(ids) == words
    assert (tokenizer.vocab_size, tokenizer.end_id) == (259, 256)
    assert tokenizer("<|im_end|>").tolist() == [tokenizer.token_id("<|im_end|>")]
    assert tokenizer.encode("é").offsets.tolist() == [[0, 1], [0, 1]]
