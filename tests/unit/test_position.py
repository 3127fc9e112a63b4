"""Position tables at other resolutions. `tests/parity` compares the towers that use them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.errors import ConfigError
from perception_jax.nn import position
from perception_jax.ops.resize import bicubic
from tests.arrays import normal

TABLE = normal(0, 1 + 37 * 37, 4)


@pytest.mark.parametrize("antialias", [False, True])
def test_the_grid_is_resized_and_the_prefix_kept(antialias):
    found = position.resample(TABLE, (24, 16), prefix=1, antialias=antialias)
    np.testing.assert_array_equal(found[0], TABLE[0])
    expected = bicubic(TABLE[1:].reshape(37, 37, 4), (24, 16), antialias=antialias)
    np.testing.assert_allclose(found[1:].reshape(24, 16, 4), expected, atol=1e-6)


def test_dinov2s_offset_counts_on_both_axes():
    found = position.resample(TABLE, (24, 16), prefix=1, antialias=False, offset=0.1)
    scale = (24.1 / 37, 16.1 / 37)
    expected = bicubic(TABLE[1:].reshape(37, 37, 4), (24, 16), scale=scale)
    np.testing.assert_allclose(found[1:].reshape(24, 16, 4), expected, atol=1e-6)


def test_a_table_of_the_right_grid_stays_as_it_is():
    half = TABLE.astype(jnp.bfloat16)
    same = position.resample(half, (37, 37), prefix=1, antialias=True, offset=0.1)
    np.testing.assert_array_equal(same, half)
    assert position.resample(half, (2, 2), prefix=1, antialias=True).dtype == jnp.float32


def test_rows_that_are_no_square_grid_are_refused():
    with pytest.raises(ConfigError, match="with 1370 rows: expected 2 and a square grid"):
        position.resample(TABLE, (24, 16), prefix=2, antialias=True)
