"""`SiglipTokenizer` against `transformers` (which runs SentencePiece itself) and open_clip's
cleaning, on a vocabulary trained here."""

from __future__ import annotations

import io
import pathlib

import numpy as np
import pytest

import perception_jax
from perception_jax.data.tokenization.siglip import SiglipTokenizer, canonical
from tests.parity.torch_code import open_clip

TEXTS = (
    "A photo of a cat.",
    "it's 12,000 na\u00efve caf\u00e9s - don't!?",
    "\u65e5\u672c \u8a9e \U0001f642 \u00df\u0130",
    "",
    "  ",
    "!!!",
    "x" * 100 + " y" * 50,
    "tabs\tand\nlines\u00a0and spaces",
    "under_score",
    "\ufb01ne \uff21\uff22\uff23 \u00bd \u2167 \ufdfa",
    "a \u2581 b",
    "zero\u200bwidth \u2026 dots \u2014 dash",
)
CONTEXT = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a `spiece.model` of T5's special tokens and normaliser."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = (pathlib.Path(perception_jax.__file__).parent / "README.md").read_text("utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.lower().splitlines()),
        model_writer=model,
        vocab_size=400,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("siglip")
    (path / "spiece.model").write_bytes(model.getvalue())
    return path


def test_ids_equal_those_of_transformers(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=CONTEXT)
    expected = theirs(list(TEXTS), padding="max_length", truncation=True, return_tensors="np")
    ours = SiglipTokenizer.from_directory(folder, CONTEXT)
    np.testing.assert_array_equal(ours(TEXTS).ids, expected["input_ids"])

    ours.save(tmp_path)
    again = transformers.SiglipTokenizer.from_pretrained(tmp_path)
    found = again(list(TEXTS), padding="max_length", truncation=True, return_tensors="np")
    np.testing.assert_array_equal(found["input_ids"], expected["input_ids"])


def test_added_tokens_equal_those_of_transformers(folder, tmp_path):
    """Also the special tokens, which texts may spell out."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=CONTEXT)
    theirs.add_tokens(["<Cat-toy>"])
    theirs.save_pretrained(tmp_path)
    ours = SiglipTokenizer.from_directory(tmp_path, CONTEXT)
    assert ours.vocab_size == 401
    texts = [
        "a <Cat-toy> on the table, the <cat-toy>",
        "<Cat-toy>",
        "a<Cat-toy>the</s>x",
        "<unk> a",
    ]
    expected = theirs(texts, padding="max_length", truncation=True, return_tensors="np")
    np.testing.assert_array_equal(ours(texts).ids, expected["input_ids"])


def test_spans_equal_those_of_sentencepiece(folder):
    """On texts that cleaning leaves alone."""
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ours = SiglipTokenizer.from_directory(folder, CONTEXT)
    for text in ("a photo of the models", "na\u00efve caf\u00e9 \U0001f642 x", ""):
        pieces = theirs.encode(text, return_type="proto").pieces  # offsets count bytes there
        encoding = ours.encode(text)
        assert encoding.ids.tolist() == [piece.id for piece in pieces]
        found = [text[first:last] for first, last in encoding.offsets]
        assert found == [piece.surface for piece in pieces]


def test_a_tokenizer_json_gives_the_same_ids(folder, tmp_path):
    ours = SiglipTokenizer.from_directory(folder, CONTEXT)
    backend = ours._backend
    backend.enable_padding(length=7)
    backend.enable_truncation(5)
    backend.save(str(tmp_path / "tokenizer.json"))
    fast = SiglipTokenizer.from_directory(tmp_path, CONTEXT)
    plain = SiglipTokenizer.from_directory(folder, CONTEXT)
    np.testing.assert_array_equal(fast(TEXTS).ids, plain(TEXTS).ids)


def test_cleaning_equals_that_of_open_clip():
    clean = open_clip().tokenizer.get_clean_fn("canonicalize")
    for text in (*TEXTS, "caf\u00c3\u00a9 &amp;amp; &lt;b&gt;", "a__b_c"):
        assert canonical(text.replace("\u2581", ""), "open_clip") == clean(
            text.replace("\u2581", "")
        )
