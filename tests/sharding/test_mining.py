"""Mining on a mesh: each device has a slice of the rows, and none the similarity matrix."""

from __future__ import annotations

import math

import numpy as np

from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import program
from perception_jax.systems.mmvp import mining
from perception_jax.systems.mmvp.mining import CHUNK, Miner, lowered
from tests.slices import printed_on_tpu, tpu_test

COUNT, WIDTH, COLUMNS, DEVICES = 8 * 3 * CHUNK, 16, 1000, 8


def test_no_device_holds_more_than_a_chunk_of_similarities():
    mesh = mesh_lib.make_mesh(2, 2, 2)
    found = list(program.results(lowered(COUNT, WIDTH, columns=COLUMNS, mesh=mesh).compile()))
    columns = math.ceil(COUNT / math.ceil(COUNT / COLUMNS))
    products = [one for one in found if one.dtype == "f32" and columns in one.shape]
    assert max(math.prod(one.shape) for one in products) == CHUNK * columns
    # What all devices get is a word for a chunk and a column; rows and products stay.
    gathered = [one for one in found if one.is_collective]
    assert {(one.dtype, math.prod(one.shape)) for one in gathered} == {
        ("u32", COUNT // CHUNK * columns)
    }


def test_rows_are_dealt_out_in_turn():
    rows = np.random.default_rng(0).normal(size=(COUNT - 5, WIDTH)).astype(np.float32)
    miner = Miner(rows, rows, columns=COLUMNS, mesh=mesh_lib.make_mesh(2, 2, 2))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    shards = sorted(miner._rows.addressable_shards, key=lambda shard: shard.index[0].start)
    for k, shard in enumerate(shards):
        assert shard.data.shape == (COUNT // DEVICES, WIDTH)
        own = unit[k::DEVICES]
        np.testing.assert_allclose(shard.data[: len(own)], own, rtol=1e-6)


@tpu_test
def test_a_million_images_fit_on_v5e_16(root):
    found = printed_on_tpu(root, "tests.sharding.tpu_mining")
    assert found["arguments"] < 0.25e9  # a sixteenth of the rows, and a block of columns
    assert found["temporary"] + found["outputs"] < 0.1e9
    assert found["collectives"] == ["u32"]
    assert found["largest_product"] <= CHUNK * mining.COLUMNS
