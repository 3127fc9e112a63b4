"""What a TPU slice would hold, compiled for it without one."""

from __future__ import annotations

from tests.slices import printed_on_tpu, tpu_test


@tpu_test
def test_vit_l14_336_keeps_its_batch_split_on_v5e(root):
    found = printed_on_tpu(root, "tests.sharding.tpu_gradient")
    assert found["temporary_bytes"] <= 2.0e9
    assert found["collectives"] > 0
    assert found["whole_batch"] == []


@tpu_test
def test_block_inputs_of_vit_l14_336_go_to_the_host(root):
    found = printed_on_tpu(root, "tests.sharding.tpu_gradient", "offload")
    # 24 inputs of 16 images, 577 tokens and 1,024 numbers in bfloat16; some are on their way.
    inputs = 24 * 16 * 577 * 1024 * 2
    assert found["host_bytes"] >= inputs
    assert found["temporary_bytes"] <= 1.9e9 - inputs / 2  # with "full" 1.86e9


@tpu_test
def test_copies_are_reduced_once_per_update_on_v5e(root):
    found = printed_on_tpu(root, "tests.sharding.tpu_accumulate", "PatchTask")
    assert found["summed_after_the_loop"] >= found["gradient"]
    assert found["summed_in_the_loop"] == 0
    coupled = printed_on_tpu(root, "tests.sharding.tpu_accumulate", "PairTask")
    assert coupled["summed_in_the_loop"] > coupled["gradient"] / 4
