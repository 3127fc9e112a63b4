"""`ClipTokenizer` against `transformers.CLIPTokenizer`, which reads what we save."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from perception_jax.data.tokenization import AddedToken, ClipTokenizer

TEXTS = (
    "A photo of a  cat.",
    "it's 12,000 na\u00efve caf\u00e9s - don't you'll!?",
    "\u65e5\u672c \u8a9e \U0001f642\U0001f642 \u00df\u0130",
    "",
    "<|startoftext|> in the middle <|endoftext|> of it",
    "x" * 300 + " y" * 100,
    "tabs\tand\nlines\u00a0and spaces",
)


@pytest.mark.parametrize("size", [(49408, 77), (4096, 16), (514, 9)])
def test_ids_and_masks_equal_those_of_transformers(tmp_path, size):
    transformers = pytest.importorskip("transformers")
    ours = ClipTokenizer.shipped(*size)
    ours.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    expected = theirs(list(TEXTS), padding="max_length", truncation=True, return_tensors="np")
    tokens = ours(TEXTS)
    np.testing.assert_array_equal(tokens.ids, expected["input_ids"])
    ends_at_last = [row for row, text in enumerate(TEXTS) if "<|endoftext|>" not in text]
    np.testing.assert_array_equal(
        tokens.mask[ends_at_last], expected["attention_mask"][ends_at_last]
    )


ADDED = (
    AddedToken("<cat-Toy>", 4096),
    AddedToken("<Raw>", 4097, normalized=False),
    AddedToken("<word>", 4098, single_word=True),
    AddedToken("<strip>", 4099, special=True, normalized=False, lstrip=True, rstrip=True),
)
HARD = (
    *TEXTS,
    *(
        "it\u2019s a dog\u2019s \u201cbed\u201d",
        "salt &amp; pepper",
        "\ufb01ne \uff21\uff22\uff23 \u01c6",
    ),
    *(
        "sch\u00c3\u00b6n",
        "\ufeffcat",
        "e\u0301\u0323 \u03a3\u03a3",
        "wow! no!!",
        "a\u2028b\u0085c",
    ),
    *("a<cat-toy>, <CAT-TOY>b", "<Raw>x <raw>", "a <word>b <word> c", "x  <strip>  y"),
)


@pytest.mark.parametrize("added", [(), ADDED], ids=["plain", "added"])
@pytest.mark.parametrize("pad_id", [None, 0])
@pytest.mark.parametrize("keep", ["tokenizer.json", "vocab.json"])
def test_cleaning_added_tokens_and_spans_equal_those_of_transformers(tmp_path, added, pad_id, keep):
    """Of a folder in the layout of Hugging Face, whichever files it has."""
    transformers = pytest.importorskip("transformers")
    ours = dataclasses.replace(
        ClipTokenizer.shipped(4096, 32, pad_id=pad_id, clean="hf"), added=added
    )
    ours.save(tmp_path)
    (tmp_path / ("vocab.json" if keep == "tokenizer.json" else "tokenizer.json")).unlink()
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    options = {"padding": "max_length", "truncation": True, "return_offsets_mapping": True}
    expected = theirs(list(HARD), return_tensors="np", **options)
    for tokenizer in (ours, ClipTokenizer.from_directory(tmp_path)):
        np.testing.assert_array_equal(tokenizer(HARD).ids, expected["input_ids"])
        np.testing.assert_array_equal(tokenizer.offsets(HARD), expected["offset_mapping"])
