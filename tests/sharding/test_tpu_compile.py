"""What a TPU slice would hold, compiled for it without one."""

from __future__ import annotations

import pytest

from tests.slices import printed_on_tpu, tpu_test


@tpu_test
def test_vit_l14_336_keeps_its_batch_split_on_v5e(root):
    found = printed_on_tpu(root, "tests.sharding.tpu_gradient")
    assert found["temporary_bytes"] <= 2.0e9
    assert found["collectives"] > 0
    assert found["whole_batch"] == []


@tpu_test
@pytest.mark.parametrize("kind", ["all", "lora"])
def test_a_7b_decoder_keeps_its_batch_and_its_vocabulary_split_on_v5e(root, kind):
    """Two of its 32 blocks: the others are the same in the scan."""
    found = printed_on_tpu(root, "tests.sharding.tpu_text", kind)
    assert found["collectives"] > 0
    assert found["whole_batch"] == []
    assert found["whole_vocabulary"] == []
    assert found["split_vocabulary"] > 0
    # Of the logits, 256 tokens of each of a chip's rows at a time; or the table, if it is larger.
    chunk = found["rows"] * 256 * found["vocabulary"]
    assert found["logits"] <= max(chunk, 4096 * found["vocabulary"])
    assert found["temporary_bytes"] <= 8.0e9
