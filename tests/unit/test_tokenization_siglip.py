"""SigLIP's tokenizer on a vocabulary of a dozen pieces: ids by hand, cleaning, files and faults."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.data.tokenization import ForeignVocabularyError
from perception_jax.data.tokenization.sentencepiece import read_unigram
from perception_jax.data.tokenization.siglip import SiglipTokenizer, canonical
from perception_jax.errors import CheckpointError, ConfigError

UNKNOWN, CONTROL = 2, 3
PIECES = [
    ("<pad>", 0.0, CONTROL),
    ("</s>", 0.0, CONTROL),
    ("<unk>", 0.0, UNKNOWN),
    ("\u2581", -3.0, 1),
    ("\u2581a", -1.0, 1),
    ("\u2581cat", -2.0, 1),
    ("\u2581c", -2.5, 1),
    ("a", -3.0, 1),
    ("t", -3.0, 1),
    ("s", -3.0, 1),
]


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


def spiece(pieces=PIECES, *, kind: int = 1, extra: bytes = b"") -> bytes:
    """A SentencePiece model file, field by field."""
    content = b""
    for piece, score, type_ in pieces:
        body = field(1, piece.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score)
        content += field(1, body + (b"" if type_ == 1 else field(3, type_)))
    return content + field(2, field(3, kind)) + extra


def tokenizer(**settings) -> SiglipTokenizer:
    return SiglipTokenizer({"spiece.model": spiece()}, **{"context": 6, **settings})


def test_ids_by_hand():
    """The likelier pieces win: "\u2581cat" (-2) before "\u2581c a t" (-8.5)."""
    tokens = tokenizer()(["A cat.", "cats at", "", "q", "a a a a a a a a"])
    assert tokens.ids.tolist() == [
        [4, 5, 1, 1, 1, 1],
        [5, 9, 4, 8, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [3, 2, 1, 1, 1, 1],
        [4, 4, 4, 4, 4, 1],  # cut, with the end token last
    ]
    assert tokens.mask.sum(1).tolist() == [3, 5, 1, 3, 6]
    assert tokenizer().decode(tokens.ids[1]) == "cats at"
    assert tokenizer()([]).ids.shape == (0, 6)


def test_cleaning():
    assert canonical("  It's a_B \u2581-- C!\n", "hf") == "its ab c"
    assert canonical("caf\u00c3\u00a9 &amp;lt;a_b", "open_clip") == "caf\u00e9 a b"


def test_round_trip_through_a_folder_and_pickle(tmp_path):
    texts = ["a_cat", "cats"]
    before = tokenizer(clean="open_clip")
    before.save(tmp_path)
    assert (tmp_path / "spiece.model").read_bytes() == spiece()
    settings_ = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings_["model_max_length"] == 6
    after = SiglipTokenizer.from_directory(tmp_path, 6)
    assert after.clean == "open_clip"
    for other in (after, pickle.loads(pickle.dumps(before))):
        np.testing.assert_array_equal(other(texts).ids, before(texts).ids)
    assert before(texts).ids[0].tolist() == [4, 5, 1, 1, 1, 1]


def test_a_tokenizer_json_comes_before_the_pieces(tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer()._backend.to_str())
    (tmp_path / "spiece.model").write_bytes(b"not read")
    found = SiglipTokenizer.from_directory(tmp_path, 6)
    assert found(["cats"]).ids[0].tolist() == [5, 9, 1, 1, 1, 1]
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected valid JSON"):
        SiglipTokenizer.from_directory(tmp_path, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected 1 to 524288 pieces, found 0"),
        (spiece()[:-10], "Unigram kind"),
        (spiece(kind=2), r"model type 2, expected 1"),
        (spiece([p for p in PIECES if p[2] != UNKNOWN]), "none of them the unknown one"),
        (spiece(extra=field(3, 5)), "Unigram kind"),
        (spiece(extra=field(1, field(1, 5))), "a number where text was expected"),
        (spiece(extra=b"\x0b"), "wire type 3"),
        (spiece(extra=b"\xff" * 12), "without an end"),
        (spiece(extra=b"\x0a\xff\xff\xff\xff\x7f"), "a field of 34359738367 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Unigram kind"),
    ],
)
def test_damaged_and_foreign_models(tmp_path, content, message):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SiglipTokenizer.from_directory(tmp_path, 6)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60), st.integers(0, len(spiece())))
def test_noise_never_gives_anything_but_our_error(noise, position):
    content = spiece()[:position] + noise + spiece()[position + len(noise) :]
    with contextlib.suppress(CheckpointError):
        assert read_unigram("x", content).pieces


def test_added_tokens_are_found_whole(tmp_path):
    """In the text as it is; what follows does not begin with a space."""
    entry = {"content": "<Toy>", "special": False}
    files = {
        "spiece.model": spiece(),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": {"10": entry}}).encode(),
    }
    found = SiglipTokenizer(files, 8)
    assert (found.vocab_size, found.end_id, found.pad_id) == (11, 1, 1)
    text = "Cats <Toy> a,t<toy>"
    encoding = found.encode(text)
    assert found([text]).ids[0].tolist() == [5, 9, 10, 7, 8, 8, 2, 1]
    assert encoding.ids.tolist()[:3] == [5, 9, 10]
    spans = [text[first:last] for first, last in encoding.offsets[:5]]
    assert spans == ["Cat", "s", "<Toy>", "a", "t"]
    assert np.array_equal(found.offsets([text])[0, :5], encoding.offsets[:5])
    assert found.decode(np.array([5, 10, 7, 1])) == "cat <Toy> a"
    cleaned = SiglipTokenizer(files, 8, clean="open_clip")
    assert 10 not in cleaned([text]).ids  # its brackets are gone by then
    assert found("Cats").ids.tolist() == found(["Cats"]).ids.tolist()


def test_padding_is_what_the_settings_say():
    files = {"spiece.model": spiece(), "special_tokens_map.json": b'{"pad_token": "<pad>"}'}
    assert SiglipTokenizer(files, 5)(["a"]).ids[0].tolist() == [4, 1, 0, 0, 0]
    del files["special_tokens_map.json"]
    for settings_, message in (
        ({"pad_token": "[PAD]"}, "pad_token.*not in the vocabulary"),
        ({"pad_token": 7}, "pad_token: expected an object"),
        ({"do_lower_case": "yes"}, "do_lower_case: expected true"),
        ({"added_tokens_decoder": {"3": {"content": "<x>"}}}, "an id of its own, found 3"),
    ):
        files["tokenizer_config.json"] = json.dumps(settings_).encode()
        with pytest.raises(CheckpointError, match=message):
            SiglipTokenizer(files, 5)


def table(*units: int, texts: bytes = b"") -> str:
    """A normaliser's table as in a `tokenizer.json`."""
    content = struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts
    return base64.b64encode(content).decode()


def steps(**changes) -> dict:
    return {"type": "Sequence", "normalizers": [changes]}


HOSTILE = [
    ({"model.type": "BPE"}, "expected a Unigram model"),
    ({"model.unk_id": 10**9}, "unk_id: expected an integer of 0 to 9"),
    ({"model.unk_id": None}, "unk_id: expected an integer"),
    ({"model.vocab": [["x" * 10**6, -1.0]]}, "piece 0: expected a new text of 1 to 512 bytes"),
    ({"model.vocab": [["", -1.0]]}, "piece 0: expected a new text"),
    ({"model.vocab": [["a", 0.0], ["a", 0.0]]}, "piece 1: expected a new text"),
    ({"model.vocab": [["a", float("nan")]]}, "piece 0: expected a finite score"),
    ({"model.vocab": [["a", True]]}, "piece 0: expected a finite score"),
    ({"model.vocab": ["a"]}, "vocab: expected a list of pieces"),
    ({"normalizer": steps(type="Precompiled", precompiled_charsmap="////")}, "within 3 bytes"),
    ({"normalizer": steps(type="Precompiled", precompiled_charsmap="?")}, "expected base64"),
    (
        {"normalizer": steps(type="Precompiled", precompiled_charsmap=table(2**31 - 1, 5))},
        "points outside",
    ),
    ({"normalizer": steps(type="Replace", pattern={"Regex": "(a+)+$"}, content="")}, "Replace"),
    ({"normalizer": steps(type="Replace", pattern={"String": "a"}, content="aa")}, "Replace"),
    ({"normalizer": steps(type="Prepend", prepend="a" * 99)}, "prepend: expected a string"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 99}}, "most 16 steps"),
    ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "FixedLength"),
    ({"pre_tokenizer": {"type": 5}}, "type: expected a string"),
    ({"added_tokens": [{"id": 2**32 - 1, "content": "<x>"}]}, "id: expected an integer"),
    ({"added_tokens": [{"id": 4, "content": "<x>"}]}, "an id of its own"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE)
def test_hostile_tokenizer_json(changes, message):
    """Several of these end the process, hang, or take gigabytes in the compiled code."""
    content = json.loads(tokenizer()._backend.to_str())
    for key, value in changes.items():
        *way, last = key.split(".")
        (content[way[0]] if way else content)[last] = value
    files = {"tokenizer.json": json.dumps(content).encode()}
    with pytest.raises(CheckpointError, match=message):
        SiglipTokenizer(files, 6)


def test_hostile_pieces_and_tables_in_a_model_file():
    long = [*PIECES, ("x" * 600, -1.0, 1)]
    with pytest.raises(CheckpointError, match="piece 10"):
        read_unigram("x", big(long))
    content = struct.pack("<3I", 8, 2**31 - 1, 5)
    with pytest.raises(CheckpointError, match="points outside"):
        read_unigram("x", spiece(extra=field(3, field(2, content))))


def big(pieces) -> bytes:
    """`spiece` for pieces of more than 127 bytes, whose lengths take two bytes."""

    def blob(number: int, value: bytes) -> bytes:
        return bytes([number << 3 | 2, len(value) & 127 | 128, len(value) >> 7]) + value

    return b"".join(
        blob(1, blob(1, piece.encode()) + (field(3, kind) if kind != 1 else b""))
        for piece, _, kind in pieces
    )


def test_other_vocabularies_are_told_from_damage(tmp_path):
    with pytest.raises(CheckpointError, match="found neither"):
        SiglipTokenizer.from_directory(tmp_path)
    swapped = [PIECES[1], PIECES[0], *PIECES[2:]]
    (tmp_path / "spiece.model").write_bytes(spiece(swapped))
    with pytest.raises(ForeignVocabularyError, match="as token 1; found 0 among 10 tokens"):
        SiglipTokenizer.from_directory(tmp_path)
    with pytest.raises(ConfigError, match="at least 2"):
        tokenizer(context=1)
    with pytest.raises(ConfigError, match="'hf' or 'open_clip'"):
        SiglipTokenizer({"spiece.model": spiece()}, clean="whitespace")
