"""Generation on eight devices: the same texts, and a decode loop that splits batch and heads."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.generate import Generator, decode, prefill
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.params import flatten
from perception_jax.shard.mesh import make_mesh
from perception_jax.shard.program import results
from perception_jax.testing.tiny_llama import CONFIG
from tests.arrays import drawn

ODD = dataclasses.replace(CONFIG, vocab_size=97)  # like 32,001
PROMPTS = [
    np.random.default_rng(row).integers(3, 97, 1 + (5 * row) % 11).tolist() for row in range(8)
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """On one device, and on a mesh, straight to the shards."""
    model = drawn(lambda: Llama(ODD, rngs=nnx.Rngs(params=0)))
    folder = tmp_path_factory.mktemp("llama") / "hf"
    processor = Processor(image=None, tokenizer=None)
    perception_jax.export(Loaded(model=model, config=ODD, processor=processor), folder)
    return model, perception_jax.load(folder, mesh=make_mesh(1, 4, 2)).model


def test_one_and_eight_devices_generate_the_same(loaded):
    model, spread = loaded
    specs = {path: leaf.sharding.spec for path, leaf in flatten(spread).items()}
    assert specs["blocks/attention/k_proj/kernel"] == P(None, "fsdp", "tensor")
    assert specs["token_embedding"] == P(None, ("fsdp", "tensor"))
    expected = Generator(model, buckets=(16, 32), chunk=4).generate(PROMPTS, tokens=6)
    with jax.set_mesh(make_mesh(1, 4, 2)):
        found = Generator(spread, buckets=(16, 32), chunk=4).generate(PROMPTS, tokens=6)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids == theirs.ids
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=2e-5)


def test_no_device_holds_the_cache_of_a_whole_layer_or_batch(loaded):
    _, spread = loaded
    ids = jnp.ones((8, 16), jnp.int32)
    with jax.set_mesh(make_mesh(1, 4, 2)):
        state = jax.jit(functools.partial(prefill, capacity=32))(spread, ids).state
        assert state.cache.keys.sharding.shard_shape(state.cache.keys.shape) == (3, 2, 1, 32, 8)
        leaves, structure = jax.tree.flatten(state)

        def loop(model, leaves):
            return jax.tree.leaves(decode(model, structure.unflatten(leaves), steps=4))

        compiled = jax.jit(loop).lower(spread, leaves).compile()
    share = 2 * 1 * 32 * 8  # of a layer's keys
    sizes = {one.shape: one.operation for one in results(compiled) if one.dtype == "f32"}
    large = [shape for shape in sizes if shape[-2:] == (32, 8) and np.prod(shape[-4:]) > share]
    assert (2, 1, 32, 8) in {shape[-4:] for shape in sizes}
    assert not large
