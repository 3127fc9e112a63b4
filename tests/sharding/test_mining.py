"""Mining on a mesh: each device has a slice of the rows, and none the similarity matrix."""

from __future__ import annotations

import math

import numpy as np

from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import program
from perception_jax.systems.mmvp.mining import CHUNK, Miner

COUNT, WIDTH, COLUMNS, DEVICES = 8 * 3 * CHUNK, 16, 1000, 8


def test_no_device_holds_more_than_a_chunk_of_similarities():
    rows = np.random.default_rng(0).normal(size=(COUNT, WIDTH)).astype(np.float32)
    miner = Miner(rows, rows, columns=COLUMNS, mesh=mesh_lib.make_mesh(2, 2, 2))
    assert miner._rows.addressable_shards[0].data.shape == (COUNT // DEVICES, WIDTH)
    found = list(program.results(miner.lower().compile()))
    products = [one for one in found if one.dtype == "f32" and COLUMNS in one.shape]
    assert {math.prod(one.shape) for one in products} >= {CHUNK * COLUMNS}
    assert max(math.prod(one.shape) for one in products) == CHUNK * COLUMNS
    # What all devices get is a byte for a chunk and a column; rows and products stay.
    gathered = [one for one in found if one.is_collective]
    assert {(one.dtype, math.prod(one.shape)) for one in gathered} == {
        ("u8", COUNT // CHUNK * COLUMNS)
    }
