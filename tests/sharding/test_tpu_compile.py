"""What a TPU slice would hold, compiled for it without one."""

from __future__ import annotations

import pytest

from tests.slices import printed_on_tpu, tpu_test


@tpu_test
@pytest.mark.parametrize(("model", "temporary"), [("vit", 1.2e9), ("decoder", 2.3e9)])
def test_gradients_keep_their_batch_split_and_no_scores_on_v5e(model, temporary, root):
    """The forward pass's kernel, that of the recomputed one, and the backward pass's."""
    found = printed_on_tpu(root, "tests.sharding.tpu_gradient", model)
    assert found["temporary_bytes"] <= temporary
    assert found["collectives"] > 0
    assert found["kernels"] == 3
    assert found["whole_batch"] == []


@tpu_test
def test_block_inputs_of_vit_l14_336_go_to_the_host(root):
    found = printed_on_tpu(root, "tests.sharding.tpu_gradient", "--remat=offload")
    # 24 inputs of 16 images, 577 tokens and 1,024 numbers in bfloat16; some are on their way.
    inputs = 24 * 16 * 577 * 1024 * 2
    assert found["host_bytes"] >= inputs
    assert found["temporary_bytes"] <= 1.2e9 - inputs / 2  # with "full" 1.14e9


@tpu_test
def test_copies_are_reduced_once_per_update_on_v5e(root):
    found = printed_on_tpu(root, "tests.sharding.tpu_accumulate", "PatchTask")
    assert found["summed_after_the_loop"] >= found["gradient"]
    assert found["summed_in_the_loop"] == 0
    coupled = printed_on_tpu(root, "tests.sharding.tpu_accumulate", "PairTask")
    assert coupled["summed_in_the_loop"] > coupled["gradient"] / 4


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
