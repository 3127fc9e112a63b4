"""Weights in the package: each loads by its name, and all together stay small."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import perception_jax
from perception_jax import api
from perception_jax.api.locate import SHIPPED
from perception_jax.models.params import flatten

MOST = 20 * 10**6
"""Bytes of all weights."""


@pytest.mark.parametrize("name", SHIPPED)
def test_every_name_loads_and_takes_its_own_images(name):
    loaded = perception_jax.load(name)
    assert loaded.name == name
    assert not loaded.report.ignored
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(flatten(loaded.model)))
    size = loaded.processor.image.size
    pixels = loaded.processor.images([np.zeros((size, size, 3), np.uint8)])
    assert pixels.shape == (1, size, size, 3)


def test_all_weights_together_stay_small():
    folder = api.shipped_folder("")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.relative_to(folder).parts[0] for path in files} == {*SHIPPED, "scenes-give"}
    assert 0 < sum(path.stat().st_size for path in files) < MOST
