"""Conversations about images as rows: image tokens, cuts, text alone, errors, whole batches."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from perception_jax.data.conversation import IGNORE, IMAGE
from perception_jax.data.grouping import Division, RowShape
from perception_jax.data.image_chats import IMAGES, KEYS, row_shapes, signed_words
from perception_jax.data.planned import Row
from perception_jax.data.records import Record
from perception_jax.errors import ConfigError, DataError
from tests.tiny_chats import IMAGE_TOKENS, SIDE, Chats, chat, data, transform


def arrays(maker, record, length=None, *, images=True) -> dict[str, np.ndarray]:
    read = maker.read(record)
    shape = RowShape(length or maker.longest, images)
    return maker(read, Row(record=0, group=3, seed=(0,), shape=shape))


def test_an_image_has_as_many_ids_as_tokens_and_none_is_predicted():
    maker = transform()
    record = chat("a", "what <image>", "the cat", "at", "a hat", images=1, colour=200)
    found = arrays(maker, record)
    ids, label = found["ids"], found["label"]
    length = int(found["id_mask"].sum())
    assert (ids == IMAGE).sum() == IMAGE_TOKENS
    first = int(np.argmax(ids == IMAGE))
    assert (ids[first : first + IMAGE_TOKENS] == IMAGE).all()
    assert not found["id_mask"][length:].any()
    assert found["id_mask"][:length].all()
    assert (label[length:] == IGNORE).all()
    assert (label[: first + IMAGE_TOKENS] == IGNORE).all()
    said = label[label != IGNORE]
    assert maker.tokenizer.decode(said) == "the cat a hat"
    assert (said == maker.tokenizer.end_id).sum() == 2
    # The image comes first in its turn, and is padded to a square with the mean colour.
    text = maker.tokenizer.decode(ids[first + IMAGE_TOKENS : length])
    assert text.lstrip(" ").startswith("\nwhat")
    (pixels,) = found[IMAGES]
    assert pixels.shape == (SIDE, SIDE, 3)
    assert (pixels[SIDE // 2] == 200).all()
    assert (pixels[0] == (122, 116, 104)).all()
    assert found["group"] == 3


def test_text_is_cut_before_images_take_their_places():
    whole = transform()
    record = chat("a", "<image>\nthe cat", "sat at a hat", images=1)
    size = len(whole.encode(record).ids)
    maker = transform(max_length=size - 3)
    found = arrays(maker, record)
    assert found["id_mask"].sum() == size - 3 + IMAGE_TOKENS - 1 == maker.longest
    expected = arrays(whole, record)
    for key in ("ids", "label"):
        np.testing.assert_array_equal(found[key], expected[key][: maker.longest])
    # An image behind the cut is not in the row.
    late = chat("b", "the cat", "sat", "<image>\nat", "a", images=1)
    place = int(np.argmax(whole.encode(late).ids == IMAGE))
    found = arrays(transform(max_length=place), late)
    assert not (found["ids"] == IMAGE).any()
    assert found["id_mask"].sum() == place


def test_text_alone_has_no_image_tokens_whatever_it_says():
    maker = transform()
    record = chat("a", "say <image> the cat", "sat")
    found = arrays(maker, record)
    assert not (found["ids"] == IMAGE).any()
    assert not found[IMAGES].any()
    assert IMAGES not in arrays(maker, record, images=False)
    assert signed_words(record) == -5
    assert signed_words(chat("b", "<image>\nsay  the", images=1)) == 3
    assert signed_words(chat("c", " ", "")) == -1


def test_several_images_keep_their_places():
    maker = transform(max_images=2)
    record = chat("a", "the <image> cat <image>", "sat", images=2, colour=9)
    found = arrays(maker, record)
    starts = np.flatnonzero(np.diff((found["ids"] == IMAGE).astype(int)) == 1)
    assert len(starts) == 2
    assert found[IMAGES].shape == (2, SIDE, SIDE, 3)
    assert maker.longest == maker.max_length + 2 * (IMAGE_TOKENS - 1)


def test_plain_learns_the_caption_and_the_line_end():
    maker = transform("plain")
    found = arrays(maker, chat("a", "Describe this.\n<image>", "the cat sat", images=1))
    ids, label = found["ids"], found["label"]
    length = int(found["id_mask"].sum())
    assert ids[0] == maker.tokenizer.start_id
    assert (ids[1 : 1 + IMAGE_TOKENS] == IMAGE).all()
    np.testing.assert_array_equal(label[1 + IMAGE_TOKENS : length], ids[1 + IMAGE_TOKENS : length])
    assert maker.tokenizer.decode(label[label != IGNORE]).strip(" ") == "the cat sat\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (chat("a", "the cat", "sat", images=1), "expected 1 turns with <image>.*found 0"),
        (
            chat("a", "<image>\nthe", "cat", "<image>\nsat", "at", images=1),
            "expected 1 turns with <image>.*found 2.*correct the row's images",
        ),
        (chat("a", "<image> <image>", "at", images=2), "expected at most 1 images.*max_images"),
        (Record(id="a"), "expected a conversation, found none"),
        (
            Record(id="a", conversation=chat("a", "the").conversation * 2),
            "expected turn 1 from the assistant, found user.*Join turns of one role",
        ),
    ],
)
def test_rows_that_do_not_fit_say_why(record, message):
    with pytest.raises(DataError, match=message):
        transform().encode(record)


def test_a_model_without_the_tokens_is_named():
    with pytest.raises(DataError, match="expected tokens below 5, the model's vocabulary"):
        transform(vocab_size=5).encode(chat("a", "the", "cat"))


def test_lengths_have_to_ascend_and_to_hold_the_longest_row():
    with pytest.raises(ConfigError, match="expected ascending numbers"):
        data(lengths=(300, 200))
    with pytest.raises(ConfigError, match="expected the last to be at least 243 tokens"):
        data(lengths=(200, 242))


def batches(chats, count: int, host=(0, 1)) -> list[dict[str, np.ndarray]]:
    with contextlib.closing(iter(chats.loader(host=host))) as rows:
        return [next(rows) for _ in range(count)]


@pytest.mark.parametrize("order", ["random", "modality"])
def test_batches_have_declared_shapes_and_are_the_same_on_two_hosts(order):
    settings = {"order": order, "lengths": (160, 180, 243)}
    source = Chats.made(24)  # with six of text alone: one whole batch of them, and a mixed one
    whole = batches(data(source, **settings), 6)
    parts = [batches(data(source, **settings), 6, host=(k, 2)) for k in range(2)]
    declared = row_shapes(settings["lengths"], order)
    for number, batch in enumerate(whole):
        assert set(batch) - {"id", IMAGES} == set(KEYS)
        assert RowShape(batch["ids"].shape[1], IMAGES in batch) in declared
        for host in range(2):
            for key, value in batch.items():
                np.testing.assert_array_equal(parts[host][number][key], value[host::2])
    kinds = {IMAGES in batch for batch in whole}
    assert kinds == ({True, False} if order == "modality" else {True})


def test_a_row_that_cannot_be_read_is_replaced_by_its_own_kind():
    good = Chats.made().records
    broken = Record(id="broken", images=(b"no image",), conversation=good[0].conversation)
    silent = Record(id="silent")
    source = Chats((broken, *good[1:], silent))
    chats = data(source, order="modality", max_bad_fraction=0.2)
    found = batches(chats, 8)
    names = {name for batch in found for name in batch["id"].tolist()}
    assert "broken" not in names
    assert "silent" not in names
    for batch in found:
        kinds = {name[:4] for name in batch["id"].tolist()}
        assert (IMAGES in batch) == ("chat" in kinds)
    assert (chats.counts.records, chats.counts.skipped, chats.counts.text_only) == (12, 1, 3)
    assert "1 cannot be used" in str(chats.counts)


def test_nothing_to_predict_at_all_is_an_error():
    source = Chats((chat("a", "<image>\nthe", "", images=1), chat("b", "cat", "")))
    with pytest.raises(DataError, match="expected answers to learn, found none in 2 of 2"):
        _ = data(source, division=Division(rows=1)).planner


def test_examples_show_each_record_in_its_own_length():
    examples = data().examples(0)
    record, shown = examples[0]
    assert record.id == "chat0"
    assert shown["image 0"].shape == (SIDE, SIDE, 3)
    assert shown["id_mask"].all()
    assert examples.record_count == len(examples) == 12
