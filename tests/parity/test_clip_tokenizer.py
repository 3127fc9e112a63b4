"""`ClipTokenizer` against `transformers.CLIPTokenizer`, which reads what we save."""

from __future__ import annotations

import numpy as np
import pytest

from perception_jax.data.tokenization import ClipTokenizer

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
