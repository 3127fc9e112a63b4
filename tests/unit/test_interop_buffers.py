"""Transposed copies are exact beyond the tiles in which they are made, whatever the dtypes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from perception_jax.interop.buffers import aligned_empty, copy_into

BFLOAT16 = ml_dtypes.bfloat16
DTYPES = [
    ("float32", "float32"),
    ("float32", BFLOAT16),
    (BFLOAT16, BFLOAT16),
    (BFLOAT16, "float32"),
    ("float64", "float32"),
    ("int64", "int32"),
    ("bool", "bool"),
]


@pytest.mark.parametrize(("stored", "wanted"), DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (64, 16), (4097, 65), (9000, 130), (3, 700)])
def test_a_transposed_matrix_is_copied_exactly(shape, stored, wanted):
    theirs = (9 * np.random.default_rng(0).standard_normal(shape[::-1])).astype(stored)
    out = aligned_empty(shape, np.dtype(wanted))
    copy_into(out, theirs.T)
    np.testing.assert_array_equal(out, theirs.T.astype(wanted))
    part = aligned_empty((shape[0] // 2, shape[1]), np.dtype(wanted))
    copy_into(part, theirs.T[shape[0] - len(part) :])  # as one shard of a mapped file
    np.testing.assert_array_equal(part, out[shape[0] - len(part) :])
