"""Known ids, cleaning, truncation, masks, smaller vocabularies, files and what is refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from perception_jax.data.tokenization.clip import ClipTokenizer, clean
from perception_jax.errors import CheckpointError, ConfigError

FULL = ClipTokenizer.shipped()
SMALL = ClipTokenizer.shipped(600, 8)


def test_known_ids_and_padding():
    tokens = FULL(["a photo of a cat", "A diagram"])
    expected = [[49406, 320, 1125, 539, 320, 2368, 49407], [49406, 320, 22697, 49407]]
    for row, mask, ids in zip(tokens.ids, tokens.mask, expected, strict=True):
        assert row.tolist() == ids + [49407] * (77 - len(ids))
        assert mask.tolist() == [k < len(ids) for k in range(77)]
    zeros = ClipTokenizer.shipped(pad_id=0)(["A diagram"])
    assert zeros.ids[0].tolist() == expected[1] + [0] * 73
    assert np.array_equal(zeros.mask[0], tokens.mask[1])


def test_cleaning():
    assert clean("  A &amp;amp; B\n\t caf\u00c3\u00a9 \u201cX\u201d ") == 'a & b caf\u00e9 "x"'


def test_truncation_keeps_the_end_token_last():
    tokens = SMALL(["one two three four five six seven eight nine"])
    assert tokens.ids[0, 0] == SMALL.start_id == 598
    assert tokens.ids[0, -1] == SMALL.end_id == 599
    assert 599 not in tokens.ids[0, :-1]
    assert tokens.mask.all()


def test_the_mask_ends_at_the_first_end_token():
    tokens = SMALL(["<|endoftext|> x"])
    assert tokens.mask[0].tolist() == [True, True] + [False] * 6


def test_a_smaller_vocabulary_keeps_the_first_merges():
    """The first merges are "i n", "t h", "a n": ids 512, 513, 514."""
    tokenizer = ClipTokenizer.shipped(517, 8)
    assert tokenizer.vocab_size == 517
    assert [tokenizer.vocab[piece] for piece in ("in", "th", "an")] == [512, 513, 514]
    ids = tokenizer(["thin"]).ids[0].tolist()
    assert ids[:4] == [515, 513, tokenizer.vocab["i"], tokenizer.vocab["n</w>"]]
    assert tokenizer.decode(tokenizer(["Thin ices"]).ids[0]) == "thin ice"  # 6 pieces fit
    common = [token for token in tokenizer.vocab if not token.startswith("<|")]
    assert all(FULL.vocab[token] == tokenizer.vocab[token] for token in common)


def test_every_byte_has_a_token_and_comes_back():
    text = "na\u00efve \u65e5\u672c \U0001f642 ~`^"
    tokenizer = ClipTokenizer.shipped(514, 64)
    assert tokenizer.decode(tokenizer([text]).ids[0]) == text
    assert FULL.decode(FULL([text]).ids[0]) == text


def test_no_texts():
    assert SMALL([]).ids.shape == (0, 8)


@pytest.mark.parametrize("keep", ["tokenizer.json", "vocab.json"])
def test_round_trip_through_a_folder_and_pickle(tmp_path, keep):
    texts = ["it's a caf\u00e9", "zebra <|endoftext|>", ""]
    tokenizer = ClipTokenizer.shipped(700, 12, pad_id=0)
    tokenizer.save(tmp_path)
    assert not list(tmp_path.glob(".*"))
    if keep == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    else:
        (tmp_path / "vocab.json").unlink()
    loaded = ClipTokenizer.from_directory(tmp_path)
    assert (loaded.context, loaded.pad_id, loaded.vocab) == (12, 0, tokenizer.vocab)
    for other in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert np.array_equal(other(texts).ids, tokenizer(texts).ids)
        assert np.array_equal(other(texts).mask, tokenizer(texts).mask)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="found neither"):
        ClipTokenizer.from_directory(tmp_path)
    SMALL.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["end_of_word_suffix"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*end_of_word_suffix"):
        ClipTokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with (tmp_path / "merges.txt").open("a") as file:
        file.write("zzz qqq\n")
    with pytest.raises(CheckpointError, match="do not belong together"):
        ClipTokenizer.from_directory(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vocab\.json: not JSON"):
        ClipTokenizer.from_directory(tmp_path)


def test_sizes_out_of_range_are_refused():
    for size in (513, 49409):
        with pytest.raises(ConfigError, match="514 to 49408"):
            ClipTokenizer.shipped(size)
    with pytest.raises(ConfigError, match="at least 2"):
        ClipTokenizer.shipped(600, 1)
    with pytest.raises(CheckpointError, match="endoftext"):
        ClipTokenizer({"a": 0, "<|startoftext|>": 1}, [])
