"""`load(..., int8=True)`: equal to quantizing a loaded model, with little memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import perception_jax
from perception_jax.api import Loaded, Processor
from perception_jax.errors import ConfigError
from perception_jax.interop import load as loading
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn import int8
from perception_jax.shard.mesh import make_mesh
from perception_jax.testing.tiny_llama import CONFIG
from tests.arrays import drawn


@pytest.fixture(scope="module")
def model() -> Llama:
    return drawn(lambda: Llama(CONFIG, rngs=nnx.Rngs(params=0)))


def exported(model, folder):
    processor = Processor(image=None, tokenizer=None)
    loaded = Loaded(model=model, config=CONFIG, processor=processor)
    perception_jax.export(loaded, folder / "hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return exported(model, tmp_path_factory.mktemp("llama"))


def assert_equal(found, expected):
    found, expected = flatten(found), flatten(expected)
    assert {path: leaf.dtype for path, leaf in found.items()} == {
        path: leaf.dtype for path, leaf in expected.items()
    }
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_equal_to_quantizing_a_loaded_model(model, folder):
    found = perception_jax.load(folder, int8=True).model
    assert_equal(found, int8.quantize_linear(perception_jax.load(folder).model))
    kernels = {p for p, leaf in flatten(found).items() if leaf.dtype == jnp.int8}
    assert kernels == {p for p in flatten(model) if p.endswith("/kernel")}
    ids = jnp.array([[1, 5, 9, 17]])
    run = jax.jit(lambda model: model(ids).logits)
    np.testing.assert_allclose(run(found), run(model), atol=0.05)


def test_kernels_are_quantized_from_the_stored_dtype(folder):
    """`dtype` is that of the other leaves; rounding to it first would cost accuracy."""
    found = perception_jax.load(folder, int8=True, dtype="bfloat16").model
    loaded = perception_jax.load(folder).model
    plain, before = int8.quantize_linear(loaded), flatten(loaded)
    rounded = {
        path: leaf.astype(jnp.bfloat16) if path in before and leaf.dtype == jnp.float32 else leaf
        for path, leaf in flatten(plain).items()
    }
    assert_equal(found, unflatten(plain, rounded))
    assert flatten(found)["token_embedding"].dtype == jnp.bfloat16


def test_no_more_than_the_int8_model_and_one_floating_leaf(folder, monkeypatch):
    before = {id(array) for array in jax.live_arrays()}
    peaks, leaves = [], []
    convert = loading._converted

    def live():
        return sum(a.nbytes for a in jax.live_arrays() if id(a) not in before)

    def watched(path, leaf, function):
        def measured(leaf):
            new = jax.block_until_ready(function(leaf))
            peaks.append(live())
            return new

        leaves.append(leaf.nbytes)
        return convert(path, leaf, function and measured)

    monkeypatch.setattr(loading, "_converted", watched)
    found = perception_jax.load(folder, int8=True)
    whole = sum(leaf.nbytes for leaf in flatten(found.model).values())
    assert len(peaks) == 8
    assert max(peaks) <= whole + max(leaves)
    assert live() <= whole
    assert sum(leaves) > whole + max(leaves)  # the bound is below the floating model


def test_on_a_mesh_each_leaf_lies_as_the_rules_say(folder):
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    found = perception_jax.load(folder, int8=True, mesh=mesh).model
    specs = {path: leaf.sharding.spec for path, leaf in flatten(found).items()}
    assert specs["blocks/attention/k_proj/kernel"] == P(None, "fsdp", "tensor")
    assert specs["blocks/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    assert specs["blocks/mlp/down/scale"] == P()
    assert all(len(leaf.sharding.device_set) == 4 for leaf in flatten(found).values())
    assert_equal(found, perception_jax.load(folder, int8=True).model)


def test_a_stack_is_quantized_layer_by_layer():
    """A float32 copy of all layers never exists (but on CPU of a bfloat16 stack)."""
    kernel = jax.ShapeDtypeStruct((16, 64, 64), jnp.float16)
    compiled = jax.jit(int8.quantize).lower(kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 64 * 64 * 4 / 4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(model, tmp_path, bad):
    leaves = dict(flatten(model))
    path = "blocks/mlp/up/kernel"
    leaves[path] = leaves[path].at[1, 2, 3].set(bad)
    source = exported(unflatten(model, leaves), tmp_path)
    with pytest.raises(ConfigError, match="expected finite weights in blocks/mlp/up, found NaN"):
        perception_jax.load(source, int8=True)


def test_other_weights_and_arguments_are_refused(folder):
    with pytest.raises(ConfigError, match="int8: expected True or False, found 'yes'"):
        perception_jax.load(folder, int8="yes")
    with pytest.raises(ConfigError, match="expected floating weights in head, found int32"):
        int8.quantized("head", jnp.ones((2, 3), jnp.int32))
