"""What a TPU slice would hold, compiled for it without one."""

from __future__ import annotations

from tests.slices import printed_on_tpu, tpu_test


@tpu_test
def test_vit_l14_336_keeps_its_batch_split_on_v5e(root):
    found = printed_on_tpu(root, "tests.sharding.tpu_gradient")
    assert found["temporary_bytes"] <= 2.0e9
    assert found["collectives"] > 0
    assert found["whole_batch"] == []
