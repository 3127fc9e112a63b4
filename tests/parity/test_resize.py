"""`ops.resize` against `torch.nn.functional.interpolate`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.ops.resize import bicubic

torch = pytest.importorskip("torch")

SIZES = [((37, 37), (16, 16)), ((5, 7), (11, 3)), ((16, 16), (24, 24)), ((4, 4), (4, 9))]


def theirs(grid, **settings):
    channels_first = torch.tensor(grid.transpose(2, 0, 1)[None])
    out = torch.nn.functional.interpolate(
        channels_first, mode="bicubic", align_corners=False, **settings
    )
    return out[0].numpy().transpose(1, 2, 0)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("stored", "wanted"), SIZES)
def test_equals_torch(stored, wanted, antialias):
    grid = np.random.default_rng(0).normal(size=(*stored, 6)).astype(np.float32)
    ours = bicubic(jnp.asarray(grid), wanted, antialias=antialias)
    np.testing.assert_allclose(ours, theirs(grid, size=wanted, antialias=antialias), atol=1e-5)


@pytest.mark.parametrize("side", [16, 24, 40])
def test_equals_torch_with_dinov2s_scale(side):
    grid = np.random.default_rng(1).normal(size=(37, 37, 4)).astype(np.float32)
    scale = (side + 0.1) / 37
    ours = bicubic(jnp.asarray(grid), (side, side), scale=(scale, scale))
    expected = theirs(grid, scale_factor=(scale, scale), recompute_scale_factor=False)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
