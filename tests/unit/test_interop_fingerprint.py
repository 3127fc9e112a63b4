"""Fingerprints of weights: equal for the same model however it lies in memory, else different."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import perception_jax
from perception_jax.interop.fingerprint import fingerprint
from perception_jax.models.params import flatten
from perception_jax.models.resized import resized
from perception_jax.models.shardings import SHARDINGS
from perception_jax.nn import stack
from perception_jax.nn.linear import Linear
from perception_jax.shard import rules
from perception_jax.shard.mesh import make_mesh
from tests.tiny_give import tiny_clip

SMALLEST = float(jnp.finfo(jnp.bfloat16).tiny)


@pytest.fixture(scope="module")
def loaded():
    given = tiny_clip()
    return dataclasses.replace(given, name="tiny")


@pytest.fixture(scope="module")
def expected(loaded) -> str:
    return fingerprint(flatten(loaded.model))


def test_every_layout_and_half_precision(loaded, expected, tmp_path):
    for layout in ("hf", "reference", "jax"):
        perception_jax.export(loaded, tmp_path / layout, layout=layout)
        for dtype in (None, "bfloat16"):
            again = perception_jax.load(tmp_path / layout, dtype=dtype)
            assert fingerprint(flatten(again.model)) == expected, (layout, dtype)


def test_layers_stacked_or_not_and_inserts_among_them(loaded, expected):
    separate = stack.separate(loaded.model, keep=True)
    assert any("/layers/" in path for path in flatten(separate))
    assert fingerprint(flatten(separate)) == expected
    inserted = jax.tree.map(lambda leaf: leaf, loaded.model)
    inserted.vision.blocks = stack.Inserted(inserted.vision.blocks, nnx.Module(), (0,))
    assert any("/base/" in path for path in flatten(inserted))
    assert fingerprint(flatten(inserted)) == expected
    larger, _ = resized(loaded.model, loaded.config, 32)
    assert fingerprint(flatten(larger)) == expected


def test_layers_of_several_kinds():
    def layers(seed: int, depth: int) -> nnx.Module:
        rngs = nnx.Rngs(params=seed)
        return stack.init(lambda rngs: Linear(2, 2, rngs=rngs), depth, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self) -> None:
            stacks = {"full": layers(0, 2), "window": layers(1, 1)}
            self.blocks = stack.Mixed(stacks, ("full", "window", "full"))

    model = Model()
    found = fingerprint(flatten(model))
    assert fingerprint(flatten(stack.separate(model, keep=True))) == found


def test_on_a_mesh(loaded, expected):
    leaves = flatten(loaded.model)
    mesh = make_mesh(replica=2, fsdp=2, tensor=2, devices=jax.devices()[:8])
    placed = rules.shardings(leaves, SHARDINGS, mesh)
    split = {path: jax.device_put(leaf, placed[path]) for path, leaf in leaves.items()}
    assert any(not leaf.is_fully_replicated for leaf in split.values())
    assert fingerprint(split) == expected


def test_other_weights(loaded, expected):
    leaves = {path: np.array(leaf) for path, leaf in flatten(loaded.model).items()}
    assert fingerprint(leaves) == expected
    kernel, other = "vision/blocks/attention/q_proj/kernel", "vision/blocks/attention/k_proj/kernel"
    one = leaves[kernel].copy()
    one[1, 3, 5] *= 1.01
    changed = {
        "one number": {kernel: one},
        "two layers swapped": {kernel: leaves[kernel][::-1]},
        "two leaves swapped": {kernel: leaves[other], other: leaves[kernel]},
        "another shape": {kernel: leaves[kernel].reshape(leaves[kernel].shape[0], -1, 16)},
    }
    found = {name: fingerprint(leaves | change) for name, change in changed.items()}
    found["one less"] = fingerprint({k: v for k, v in leaves.items() if k != kernel})
    assert len({expected, *found.values()}) == 1 + len(found)


def test_an_exact_one_counts_every_bit(loaded):
    leaves = {path: np.array(leaf) for path, leaf in flatten(loaded.model).items()}
    kernel, positions = "vision/projection/kernel", "vision/position_embedding"
    for path in (kernel, positions):
        changed = leaves[path].copy()
        changed.reshape(-1)[3] += np.spacing(changed.reshape(-1)[3])
        assert fingerprint(leaves | {path: changed}) == fingerprint(leaves)
        assert fingerprint(leaves | {path: changed}, exact=True) != fingerprint(leaves, exact=True)
    narrow = {path: jnp.asarray(leaf).astype(jnp.bfloat16) for path, leaf in leaves.items()}
    wide = {path: np.asarray(leaf, np.float32) for path, leaf in narrow.items()}
    assert fingerprint(narrow) == fingerprint(wide)
    assert fingerprint(narrow, exact=True) != fingerprint(wide, exact=True)
    assert fingerprint(flatten(loaded.model), exact=True) == fingerprint(leaves, exact=True)


def test_numbers_at_the_edges_of_bfloat16():
    """Rounded as numpy and XLA round; a zero is a zero whatever its sign."""
    rng = np.random.default_rng(0)
    values = np.float32(rng.normal(size=4096) * 10.0 ** rng.integers(-30, 30, 4096))
    ties = (values.view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)
    for wide in (values, ties, np.float32([0.0, -0.0, SMALLEST, -SMALLEST, 1.0, np.inf])):
        narrow = jnp.asarray(wide).astype(jnp.bfloat16)
        assert fingerprint({"x": narrow}) == fingerprint({"x": wide})
        assert fingerprint({"x": np.float64(wide)}) == fingerprint({"x": wide})
    zeros = [fingerprint({"x": np.float32([x])}) for x in (0.0, -0.0, 1e-42, SMALLEST)]
    assert zeros[0] == zeros[1] == zeros[2] != zeros[3]
