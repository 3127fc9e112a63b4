"""Known ids, cleaning, truncation, masks, smaller vocabularies, files and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest

from perception_jax.data.tokenization import (
    AddedToken,
    ForeignVocabularyError,
    PaddedTokenizer,
    check_fits,
)
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
    with pytest.raises(CheckpointError, match=r"vocab\.json: expected valid JSON"):
        ClipTokenizer.from_directory(tmp_path)


TOY = AddedToken("<Cat-toy>", 600)


@pytest.mark.parametrize("mode", ["hf", "open_clip"])
def test_added_tokens_are_found_whole_with_the_ids_of_the_files(tmp_path, mode):
    """Behind the end token, whose id they do not move."""
    tokenizer = dataclasses.replace(SMALL, added=(TOY,), clean=mode)
    assert (tokenizer.end_id, tokenizer.vocab_size, tokenizer.is_openai) == (599, 601, False)
    text = "a<cat-toy> on  &amp; <CAT-TOY>"
    rows = tokenizer([text]).ids[0].tolist()
    assert (rows[2], rows[-1]) == (600, 599)
    found = tokenizer._backend.get_vocab()
    assert len(set(found.values())) == len(found)  # else a copy keeps one of two, by chance
    encoding = tokenizer.encode(text)
    found = [text[first:last] for first, last in encoding.offsets[encoding.ids == 600]]
    assert found == ["<cat-toy>", "<CAT-TOY>"]
    tokenizer.save(tmp_path)
    again = ClipTokenizer.from_directory(tmp_path)
    assert (again.added, again.clean, again.vocab) == ((TOY,), mode, SMALL.vocab)
    for other in (again, pickle.loads(pickle.dumps(tokenizer))):
        assert other([text]).ids[0].tolist() == rows
    (tmp_path / "tokenizer.json").unlink()  # the settings list them too
    assert ClipTokenizer.from_directory(tmp_path)([text]).ids[0].tolist() == rows


def test_special_tokens_are_those_that_the_settings_name(tmp_path):
    """Neither the names nor the last ids of the vocabulary."""
    byte = {token: k + 2 for token, k in ClipTokenizer.shipped(514).vocab.items() if k < 512}
    vocab = {"[end]": 0, "[start]": 1, **byte, "[pad]": 514}
    ClipTokenizer(vocab, [], 8, 514, start="[start]", end="[end]", unknown="[end]").save(tmp_path)
    tokenizer = ClipTokenizer.from_directory(tmp_path)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (1, 0, 514)
    assert tokenizer(["a"]).ids[0].tolist() == [1, vocab["a</w>"], 0, *[514] * 5]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps(settings | {"eos_token": "[stop]"}))
    with pytest.raises(CheckpointError, match=r"eos_token '\[stop\]' is not in the vocabulary"):
        ClipTokenizer.from_directory(tmp_path)


def test_two_ways_of_cleaning(tmp_path):
    """An HTML entity and a curly quote: seven tokens as they are, four when cleaned."""
    text, plain = "salt &amp; it\u2019s", "salt & it's"
    hf, authors = (ClipTokenizer.shipped(context=16, clean=mode) for mode in ("hf", "open_clip"))
    assert hf([text]).mask.sum() > authors([text]).mask.sum()
    assert np.array_equal(authors([text]).ids, hf([plain]).ids)
    authors.save(tmp_path)
    assert ClipTokenizer.from_directory(tmp_path, clean="hf").clean == "open_clip"
    (tmp_path / "tokenizer_config.json").unlink()
    assert ClipTokenizer.from_directory(tmp_path).clean == "hf"
    with pytest.raises(ConfigError, match="'hf' or 'open_clip'"):
        ClipTokenizer.shipped(clean="lower")


def test_padding_with_a_word_is_no_special_token_of_the_authors_code(tmp_path):
    """Hugging Face would find its pad token whole in texts: there "!" is 0, here "!</w>", 256."""
    ClipTokenizer.shipped(600, 6, pad_id=0).save(tmp_path)
    tokenizer = ClipTokenizer.from_directory(tmp_path)
    assert tokenizer(["!"]).ids[0].tolist() == [598, 256, 599, 0, 0, 0]
    dataclasses.replace(tokenizer, clean="hf").save(tmp_path)
    tokenizer = ClipTokenizer.from_directory(tmp_path)
    assert tokenizer(["!"]).ids[0].tolist() == [598, 0, 599, 0, 0, 0]


def test_spans_in_the_original_text():
    text = "  A caf\u00c3\u00a9 &amp; it\u2019s \U0001f642"
    for mode, expected in (
        ("open_clip", ["A", "caf\u00c3\u00a9", "&", "it", "\u2019s", "\U0001f642"]),
        (
            "hf",
            ["A", "caf", "\u00c3", "\u00a9", "&", "amp", ";", "it", "\u2019", "s", "\U0001f642"],
        ),
    ):
        tokenizer = ClipTokenizer.shipped(context=16, clean=mode)
        encoding = tokenizer.encode(text)
        found = [text[first:last] for first, last in encoding.offsets]
        assert list(dict.fromkeys(found)) == expected  # the bytes of a character share its span
        row, spans = tokenizer([text]).ids[0], tokenizer.offsets([text])[0]
        assert np.array_equal(row[1 : 1 + len(found)], encoding.ids)
        assert np.array_equal(spans[1 : 1 + len(found)], encoding.offsets)
        assert not spans[0].any()
        assert not spans[1 + len(found) :].any()
    assert SMALL.offsets(["one two three four five"]).shape == (1, 8, 2)
    assert SMALL.encode("").offsets.shape == (0, 2)


def test_a_string_alone_is_one_text():
    assert isinstance(SMALL, PaddedTokenizer)
    assert np.array_equal(SMALL("a dog").ids, SMALL(["a dog"]).ids)


def test_tokenizer_and_tower_are_compared():
    check_fits(SMALL, rows=600, end_id=599)
    check_fits(SMALL, rows=640)
    with pytest.raises(CheckpointError, match=r"600 token embeddings.*ids up to 600"):
        check_fits(dataclasses.replace(SMALL, added=(TOY,)), rows=600)
    with pytest.raises(CheckpointError, match=r"end token 598 .*ends texts with 599"):
        check_fits(SMALL, rows=600, end_id=598)


HOSTILE = {
    "tokenizer.json": [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "expected a BPE model"),
        ({"model": None}, "model: expected an object"),
        ({"model.vocab": ["a"]}, "vocab: expected an object"),
        ({"model.vocab": {"a": 2**40}}, "the id of 'a': expected an integer"),
        ({"model.vocab": {"a": True}}, "the id of 'a': expected an integer"),
        ({"model.vocab": {"a": 0, "b": 0}}, "one token for each id"),
        ({"model.vocab": {"\ud800": 0}}, "expected the token '<|startoftext|>'"),
        ({"model.merges": None}, "merges: expected a list"),
        ({"model.merges": ["a b c"]}, "do not belong together"),
        ({"model.merges": [["a", 5]]}, r"merges\[0\]: expected two tokens"),
        ({"added_tokens": 7}, "added_tokens: expected a list"),
        ({"added_tokens": [{"id": 1, "content": "b"}]}, "with its id in the vocabulary"),
        ({"added_tokens": [{"id": 1.5, "content": "<x>"}]}, "id: expected an integer"),
        ({"added_tokens": [{"id": 900, "content": "x" * 600}]}, "content: expected a string"),
        ({"added_tokens": [{"id": 900, "content": "x", "lstrip": 1}]}, "lstrip: expected true"),
        ({"added_tokens": [{"id": 599, "content": "<x>"}]}, "one token for each id"),
    ],
    "tokenizer_config.json": [
        ({"model_max_length": "77"}, "model_max_length: expected an integer"),
        ({"model_max_length": -5}, "model_max_length: expected an integer"),
        ({"eos_token": 5}, "eos_token: expected an object"),
        ({"pad_token": {"content": ""}}, "pad_token: expected a token's text"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: expected an object"),
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "id: expected an integer"),
        ({"perception_jax_clean": "both"}, "perception_jax_clean: expected one of"),
    ],
    "special_tokens_map.json": [({"bos_token": []}, "bos_token: expected an object")],
    "added_tokens.json": [({"<x>": 900, "a": 3}, "with its id in the vocabulary")],
}


def test_hostile_files_are_refused_with_one_error(tmp_path):
    SMALL.save(tmp_path)
    for name, cases in HOSTILE.items():
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else None
        for changes, message in cases:
            content = {} if before is None else json.loads(before)
            for key, value in changes.items():
                *way, last = key.split(".")
                (content[way[0]] if way else content)[last] = value
            path.write_text(json.dumps(content))
            with pytest.raises(CheckpointError, match=message):
                ClipTokenizer.from_directory(tmp_path)
        path.write_text("[" * 100_000)
        with pytest.raises(CheckpointError, match="expected valid JSON"):
            ClipTokenizer.from_directory(tmp_path)
        path.unlink() if before is None else path.write_bytes(before)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"merges\.txt: expected UTF-8"):
        ClipTokenizer.from_directory(tmp_path)


def test_a_vocabulary_of_another_kind_is_told_from_damage(tmp_path):
    model = {"type": "WordPiece", "vocab": {"[UNK]": 0}}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(ForeignVocabularyError, match="'WordPiece'"):
        ClipTokenizer.from_directory(tmp_path)


def test_sizes_out_of_range_are_refused():
    for size in (513, 49409):
        with pytest.raises(ConfigError, match="514 to 49408"):
            ClipTokenizer.shipped(size)
    with pytest.raises(ConfigError, match="at least 2"):
        ClipTokenizer.shipped(600, 1)
    with pytest.raises(CheckpointError, match="endoftext"):
        ClipTokenizer({"a": 0, "<|startoftext|>": 1}, [])
