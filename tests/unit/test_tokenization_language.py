"""Tokenizers of language models on a vocabulary written by hand: modes, streams, files, faults."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.data.tokenization import (
    MODES,
    ForeignVocabularyError,
    LanguageTokenizer,
    Tokenizer,
    read_tokenizer,
)
from perception_jax.data.tokenization.bpe import byte_symbols, byte_values
from perception_jax.data.tokenization.gguf import from_gguf
from perception_jax.data.tokenization.sentencepiece import (
    BPE,
    UNIGRAM,
    USER_DEFINED,
    read_sentencepiece,
    write_sentencepiece,
)
from perception_jax.errors import CheckpointError, ConfigError, DataError
from perception_jax.testing.tiny_llama_vocabulary import MODEL, MODEL_TEXTS, piece

MODEL_FILE = write_sentencepiece(MODEL)
IMAGE = len(MODEL.pieces)
TEXTS = (
    *("", " ", "cat", "cats at the", "</s>", "<s></s> cat", "a</s>cat", "<image> a"),
    "h\u00e9 \U0001f642\n",
)


def llama(mode: str, **files: bytes) -> LanguageTokenizer:
    """With "<image>" added."""
    content = {"tokenizer.model": MODEL_FILE, "added_tokens.json": b'{"<image>": %d}' % IMAGE}
    return LanguageTokenizer(content | files, mode)


def spelt(tokenizer: LanguageTokenizer, text: str) -> list[str]:
    """Tokens of a text."""
    return [(*MODEL_TEXTS, "<image>")[number] for number in tokenizer.encode(text).ids]


def byte_level() -> dict:
    """A `tokenizer.json` with bytes, two merges and two special tokens."""
    vocab = {symbol: k for k, symbol in enumerate(byte_symbols())} | {"at": 256, "\u0120c": 257}
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"special": True, "normalized": False}
    return {
        "added_tokens": [
            {"id": 258, "content": "<|end|>", **special},
            {"id": 300, "content": "<|pad|>", **special},
        ],
        "normalizer": None,
        "pre_tokenizer": step,
        "post_processor": None,
        "decoder": step,
        "model": {"type": "BPE", "vocab": vocab, "merges": ["a t", ["\u0120", "c"]]},
    }


def files_of(content: dict, **settings_: object) -> dict[str, bytes]:
    return {
        "tokenizer.json": json.dumps(content).encode(),
        "tokenizer_config.json": json.dumps(settings_).encode(),
    }


def test_three_modes_by_hand():
    """A special token begins a new text with a "\u2581" (legacy, fast) or does not; with the slow
    tokenizers an added token takes the spaces around it along."""
    text = "cat</s>cat <image> cat"
    cat, end, image = "\u2581cat", "</s>", "<image>"
    bare = ["c", "at"]
    assert spelt(llama("slow_legacy"), text) == [cat, end, cat, image, cat]
    assert spelt(llama("slow"), text) == [cat, end, *bare, image, *bare]
    entry = {"content": image, "special": True, "normalized": False}
    added = json.dumps({"added_tokens_decoder": {str(IMAGE): entry}}).encode()
    fast = llama("fast", **{"tokenizer_config.json": added})
    assert spelt(fast, text) == [cat, end, cat, "\u2581", image, "\u2581", cat]


def test_the_start_of_a_text_without_legacy():
    """Its lone "\u2581" is dropped before a special token and kept before an added one; a passage
    loses what merges with the unknown token that the reference puts before it."""
    slow = llama("slow")
    assert spelt(slow, "<s>cat") == ["<s>", "c", "at"]
    assert spelt(slow, "<image>") == ["\u2581", "<image>"]
    assert spelt(slow, "</s>=at") == ["</s>", "at"]
    assert spelt(llama("slow_legacy"), "</s>=at") == ["</s>", "\u2581", "=", "at"]


@pytest.mark.parametrize("mode", MODES)
def test_special_ids_are_those_of_the_files(mode):
    tokenizer = llama(mode)
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.unknown_id) == (1, 2, 0)
    assert (tokenizer.pad_id, tokenizer.max_length, tokenizer.end_ids) == (None, None, (2,))
    assert (tokenizer.vocab_size, tokenizer.token_id("<image>")) == (IMAGE + 1, IMAGE)
    assert tokenizer("cat").tolist() == [1, piece("\u2581cat")]
    other = llama(
        mode,
        **{
            "tokenizer_config.json": json.dumps(
                {"add_bos_token": False, "add_eos_token": True, "model_max_length": 9}
            ).encode(),
            "special_tokens_map.json": b'{"bos_token": "</s>", "pad_token": "<image>"}',
            "generation_config.json": b'{"eos_token_id": [7, 2]}',
        },
    )
    assert (other.start_id, other.pad_id, other.max_length, other.end_ids) == (2, IMAGE, 9, (7, 2))
    assert other("cat").tolist() == [piece("\u2581cat"), 2]
    assert tokenizer.decode([1, 2, 0]) == ""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", TEXTS)
def test_spans_and_round_trips(mode, text):
    """Spans are in order and cover all but white space that an added token took along."""
    tokenizer = llama(mode)
    encoding = tokenizer.encode(text)
    at = 0
    for first, last in encoding.offsets.tolist():
        assert first <= last >= at
        assert text[at:first].strip() == ""
        at = last
    assert text[at:].strip() == ""
    plain = text.replace("<image>", "").replace("</s>", "").replace("<s>", "")
    if plain == text:
        assert tokenizer.decode(tokenizer(text)) == text


@pytest.mark.parametrize("mode", MODES)
def test_half_of_a_surrogate_pair(mode):
    with pytest.raises(DataError, match="half of a surrogate pair at 1"):
        llama(mode)("a\ud83db")
    assert llama(mode).decode(np.array([1, piece("he"), 9999])) == "he"


@pytest.mark.parametrize("mode", MODES)
def test_long_texts(mode):
    """Of 100,000 characters, in words and in one."""
    tokenizer = llama(mode)
    for text, count in (("cat " * 25_000, 25_001), ("at" * 50_000, 50_001)):
        ids = tokenizer.encode(text).ids
        assert len(ids) == count
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("slow_legacy", ["", "", "\u00e9", "", "\ufffd\ufffdcat", ""]),
        ("slow", ["", "", "\u00e9", "", "\ufffd\ufffd cat", ""]),
        # `tokenizers` gives up on a whole run of bytes of which one is invalid.
        ("fast", ["", "", "", "", "\ufffd\ufffd\ufffd\ufffd cat", ""]),
    ],
)
def test_streams_hold_back_unfinished_characters(mode, expected):
    tokenizer = llama(mode)
    ids = [1, *(3 + byte for byte in b"\xc3\xa9\xe2\x82"), piece("\u2581cat")]
    if mode == "slow_legacy":  # SentencePiece drops the space of a first word only
        expected = ["", "", "\u00e9", "", "\ufffd\ufffd cat", ""]
    stream = tokenizer.stream()
    found = [stream.push([number]) for number in ids]
    assert [*found[:3], found[3] + found[4], found[5], stream.close()] == expected
    assert tokenizer.decode(ids) == "".join(expected)
    unfinished = tokenizer.stream()
    assert unfinished.push(ids[3:]) + unfinished.close() != ""
    bytes_only = tokenizer.stream()
    assert bytes_only.push(ids[3:5]) == ""
    assert bytes_only.close() == "\ufffd\ufffd"


@pytest.mark.parametrize("start", ["slow_legacy", "slow", "byte level"])
def test_further_special_tokens(start, tmp_path):
    """They take no white space along, and the others stay what they are."""
    if start == "byte level":
        given = LanguageTokenizer(files_of(byte_level(), eos_token="<|end|>"), "fast")
    else:
        given = llama(start)
    number = given.vocab_size
    found = given.with_tokens({"<img>": number, "<pad>": number + 1})
    found.save(tmp_path)
    again = read_tokenizer(tmp_path)
    for one in (found, again):
        assert (one.vocab_size, one.mode) == (number + 2, given.mode)
        assert one("at cat").tolist() == given("at cat").tolist()
        ids = one("at <img> cat").tolist()
        assert ids[: len(given("at "))] == given("at ").tolist()
        assert ids.count(number) == 1
        assert one.decode([number]) == ""
        assert one.decode([number], special=True) == "<img>"
        assert one.start_id == given.start_id
    for wrong in ({"<other>": number}, {"<img>": number + 2}):
        with pytest.raises(CheckpointError, match="expected a new token, found"):
            found.with_tokens(wrong)


def test_byte_level():
    tokenizer = LanguageTokenizer(files_of(byte_level(), eos_token="<|end|>"), "fast")
    assert tokenizer.encode("cat cat").ids.tolist() == [66, 256, 257, 256]
    assert tokenizer("at<|end|>").tolist() == [256, 258]
    assert (tokenizer.end_id, tokenizer.start_id, tokenizer.vocab_size) == (258, None, 301)
    text = "h\u00e9 \U0001f642\n \x00"
    assert tokenizer.decode(tokenizer(text)) == text
    values = byte_values()
    ids = {value: byte_symbols().index(symbol) for symbol, value in values.items()}
    stream = tokenizer.stream()
    found = [stream.push([ids[byte]]) for byte in b"\xf0\x9f\x99\x82\xe2\x82a\xff"]
    assert found == ["", "", "", "\U0001f642", "", "", "\ufffda", "\ufffd"]
    assert stream.push([258, 299, 10**6]) + stream.close() == ""
    with pytest.raises(CheckpointError, match="expected an eos_token"):
        _ = LanguageTokenizer(files_of(byte_level()), "fast").end_id


def test_what_a_post_processor_adds():
    content = byte_level()
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|end|>"}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [258], "tokens": ["<|end|>"]}},
    }
    tokenizer = LanguageTokenizer(files_of(content), "fast")
    assert (tokenizer.start_id, tokenizer("at").tolist()) == (258, [258, 256])
    refused = LanguageTokenizer(files_of(content, add_bos_token=False), "fast")
    assert refused("at").tolist() == [256]
    with pytest.raises(CheckpointError, match="add_eos_token: expected a eos_token"):
        LanguageTokenizer(files_of(content, add_eos_token=True), "fast")


@pytest.mark.parametrize("mode", MODES)
def test_folders_and_pickles(tmp_path, mode):
    before = llama(mode)
    before.save(tmp_path)
    after = read_tokenizer(tmp_path)
    assert after.mode == mode
    for other in (after, pickle.loads(pickle.dumps(before))):
        for text in TEXTS:
            np.testing.assert_array_equal(other(text), before(text))


def test_the_mode_that_a_folder_says(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(MODEL_FILE)
    assert read_tokenizer(tmp_path).mode == "slow_legacy"
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    assert read_tokenizer(tmp_path).mode == "slow"
    (tmp_path / "tokenizer.json").write_bytes(files_of(byte_level())["tokenizer.json"])
    assert read_tokenizer(tmp_path).mode == "fast"
    assert read_tokenizer(tmp_path, "slow_legacy").encode("cat").ids.tolist() == [
        piece("\u2581cat")
    ]
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match=r"mode 'slow': expected tokenizer\.model"):
        read_tokenizer(tmp_path, "slow")
    with pytest.raises(ConfigError, match="mode: expected one of 'slow_legacy'"):
        read_tokenizer(tmp_path, "quick")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="found neither"):
        read_tokenizer(tmp_path)


def test_model_files_read_back():
    assert read_sentencepiece("x", MODEL_FILE, BPE) == MODEL
    with pytest.raises(ForeignVocabularyError, match=r"model type 2, expected 1 \(Unigram\)"):
        read_sentencepiece("x", MODEL_FILE, UNIGRAM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"squeeze": True}, "white space kept"),
        ({"suffix": True}, "spaces before words"),
        ({"kinds": (*MODEL.kinds[:-1], USER_DEFINED)}, "no user-defined"),
        ({"pieces": (*MODEL.pieces[:9], ("x", 0.0), *MODEL.pieces[10:])}, "each of the 256 bytes"),
    ],
)
def test_foreign_models(changes, message):
    content = write_sentencepiece(dataclasses.replace(MODEL, **changes))
    with pytest.raises(CheckpointError, match=message):
        LanguageTokenizer({"tokenizer.model": content}, "slow")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(MODEL_FILE)))
def test_noise_never_gives_anything_but_our_error(noise, position):
    content = MODEL_FILE[:position] + noise + MODEL_FILE[position + len(noise) :]
    with contextlib.suppress(CheckpointError):
        tokenizer = LanguageTokenizer({"tokenizer.model": content}, "slow_legacy")
        assert tokenizer.vocab_size > 3


HOSTILE = [
    ({"model.type": "WordPiece"}, "expected a BPE model"),
    ({"model.dropout": 0.5}, "expected a BPE model"),
    ({"model.vocab": {}}, "expected 1 to 1048576 tokens"),
    ({"model.vocab": {"x" * 2000: 0}}, "the longest of 2000"),
    ({"model.vocab": {"a": 0, "b": 0}}, "expected one token for each id"),
    ({"model.vocab": {"a": -1}}, "expected an integer"),
    ({"model.merges": ["a zz"]}, "do not belong together"),
    ({"model.merges": [["a"]]}, r"merges\[0\]: expected two tokens"),
    ({"model.merges": None}, "merges: expected a list"),
    ({"model.unk_token": "<unk>"}, "expected the unknown token"),
    ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}}, "Regex: expected one"),
    ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "FixedLength"),
    ({"normalizer": {"type": "Prepend", "prepend": "a" * 99}}, "prepend: expected a string"),
    ({"decoder": {"type": "WordPiece"}}, "expected a decoder of bytes"),
    ({"decoder": None}, "expected a decoder of bytes"),
    ({"post_processor": {"type": "TemplateProcessing"}}, "around one text, found None"),
    ({"added_tokens": [{"id": 2**32, "content": "<x>"}]}, "id: expected an integer"),
    ({"added_tokens": [{"id": 3, "content": "<x>"}]}, "expected one token for each id"),
    ({"added_tokens": 5}, "added_tokens: expected a list"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
def test_hostile_tokenizer_json(changes, message):
    content = byte_level()
    for key, value in changes.items():
        *way, last = key.split(".")
        (content[way[0]] if way else content)[last] = value
    with pytest.raises(CheckpointError, match=message):
        LanguageTokenizer(files_of(content), "fast")


def gguf(model: str, **changes: object) -> dict:
    """The metadata of a GGUF file."""
    if model == "llama":
        lists = {
            "tokens": MODEL_TEXTS,
            "scores": [score for _, score in MODEL.pieces],
            "token_type": list(MODEL.kinds),
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        }
    else:
        lists = {
            "tokens": [*byte_level()["model"]["vocab"], "<|end|>"],
            "token_type": [*[1] * 258, 3],
            "merges": ["a t", "\u0120 c"],
            "pre": "smollm",
            "eos_token_id": 258,
        }
    fields = {"model": model, **lists, **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


def test_gguf(tmp_path):
    tokenizer = from_gguf(gguf("llama"))
    assert tokenizer.mode == "slow_legacy"
    assert tokenizer("cat</s>cat").tolist() == [1, piece("\u2581cat"), 2, piece("\u2581cat")]
    tokenizer = from_gguf(gguf("gpt2", padding_token_id=258))
    assert (tokenizer.mode, tokenizer.end_id, tokenizer.pad_id) == ("fast", 258, 258)
    assert tokenizer("cat cat12<|end|>").tolist() == [66, 256, 257, 256, 16, 17, 258]
    tokenizer.save(tmp_path)
    assert read_tokenizer(tmp_path)("cat cat").tolist() == [66, 256, 257, 256]


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("bert", {}, "model: expected 'llama' or 'gpt2', found 'bert'"),
        ("gpt2", {"pre": "gpt-5"}, "pre: expected one of gpt-2"),
        ("gpt2", {"merges": "a t"}, "merges: expected a list"),
        ("gpt2", {"eos_token_id": 259}, "eos_token_id: expected an integer of 0 to 258"),
        ("llama", {"scores": [0.0]}, "scores: expected a list of 274 values of the type float"),
        ("llama", {"tokens": None}, "tokens: expected a list of values of the type str"),
        ("llama", {"token_type": [9] * 274}, "kinds of pieces from 1 to 6"),
    ],
)
def test_damaged_gguf(model, changes, message):
    with pytest.raises(CheckpointError, match=message):
        from_gguf(gguf(model, **changes))
