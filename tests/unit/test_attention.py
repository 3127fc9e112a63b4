"""Attention over long sequences, one head after the other, against a dense softmax by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.nn.attention import LONG, AttentionMask, attend, blocks, core
from perception_jax.nn.attention.mask import dense_mask
from tests.arrays import normal

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 130, 140, 3, 8


def coins(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.5)


MASKS = {
    "none": None,
    "shared": jnp.asarray(np.tril(np.ones((1, 1, QUERIES, KEYS), bool))),
    "keys of each example": coins(7, BATCH, 1, 1, KEYS),
    "each head": coins(8, 1, HEADS, QUERIES, KEYS),
}


def dense(q, k, v, mask):
    scores = jnp.einsum("btnh,bknh->bntk", q, k) * WIDTH**-0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    return jnp.einsum("bntk,bknh->btnh", jax.nn.softmax(scores, axis=-1), v)


def arrays():
    sizes = (QUERIES, KEYS, KEYS, QUERIES)
    return [normal(seed, BATCH, size, HEADS, WIDTH) for seed, size in enumerate(sizes)]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_long_attention_and_its_gradients_equal_a_dense_softmax(mask):
    assert QUERIES * KEYS >= LONG
    q, k, v, readout = arrays()

    def both(function):
        def score(q, k, v):
            out = function(q, k, v, mask)
            return jnp.sum(out * readout), out

        return jax.jit(jax.grad(score, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    chex.assert_trees_all_close(both(attend), both(dense), atol=2e-6)


@pytest.mark.parametrize(("scores", "loops"), [(1 << 21, 0), (1, 2), (8 * 131 * 140, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_on_cpu_change_nothing(scores, loops, masked, monkeypatch):
    """Blocks of examples and heads, then halves of the query rows."""
    q, k, v = normal(0, 6, 131, 4, WIDTH), normal(1, 6, 140, 2, WIDTH), normal(2, 6, 140, 2, WIDTH)
    mask = coins(7, 6, 4, 131, 140) if masked else None

    @jax.jit
    def grouped(q, k, v, mask):
        return dense(q, *(jnp.repeat(x, 2, axis=2) for x in (k, v)), mask)

    expected = grouped(q, k, v, mask)
    monkeypatch.setattr(blocks, "SCORES", scores)
    for fused, halves in ((1 << 16, 0), (70 * 140, 0 if masked else 1)):
        monkeypatch.setattr(blocks, "FUSED_SCORES", fused)
        jax.clear_caches()
        compiled = jax.jit(attend).lower(q, k, v, mask).compile()
        assert compiled.as_text().count(" while(") == loops + halves
        chex.assert_trees_all_close(compiled(q, k, v, mask), expected, atol=2e-6)


@pytest.mark.parametrize("tokens", [4, 128], ids=["short", "long"])
def test_a_query_without_keys_takes_the_mean(tokens):
    q, k, v = (normal(seed, 1, tokens, 2, 8) for seed in range(3))
    mask = np.ones((1, 1, tokens, tokens), bool)
    mask[0, 0, 1] = False
    mask = jnp.asarray(mask)
    out = jax.jit(attend)(q, k, v, mask)
    np.testing.assert_allclose(np.asarray(out)[0, 1], np.asarray(v)[0].mean(axis=0), atol=1e-6)


def test_training_keeps_no_scores_of_long_sequences():
    """Compiled memory of a gradient through four layers: less than the scores of a single one."""
    tokens, heads = 512, 8
    x = jax.ShapeDtypeStruct((1, tokens, heads, 4), jnp.float32)

    def loss(x):
        for _ in range(4):
            x = jnp.tanh(attend(x, x, x))
        return x.sum()

    memory = jax.jit(jax.grad(loss)).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < heads * tokens * tokens * 4


def lowered(platform, dtype, mask=None):
    """The program of an attention and its gradient on a platform that need not be here."""
    q, k, v, _ = (x.astype(dtype) for x in arrays())
    both = jax.jit(jax.value_and_grad(lambda q: attend(q, k, v, mask).sum().astype(jnp.float32)))
    return both.trace(q).lower(lowering_platforms=(platform,)).as_text()


def test_cudnn_serves_16_bits_on_cuda_alone(monkeypatch):
    monkeypatch.setattr(core, "_has_cudnn", lambda: True)
    # Stands in for a kernel that cannot even be lowered without a GPU.
    monkeypatch.setattr(core, "_cudnn", lambda q, k, v, mask: jnp.cos(q) + (k + v).mean())
    for platform in ("cpu", "cuda", "tpu"):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            for name in ("none", "shared", "each head"):
                text = lowered(platform, dtype, MASKS[name])
                served = platform == "cuda" and dtype != jnp.float32 and name != "each head"
                # The cosine is its output, the sine its gradient.
                for mark in ("stablehlo.cosine", "stablehlo.sine"):
                    assert (mark in text) == served, (platform, dtype, name)


CUDNN_MASKS = {
    "none": None,
    "pairs of tokens": MASKS["shared"],
    "keys of each example": MASKS["keys of each example"],
    "lengths": AttentionMask(lengths=jnp.array([60, 0])),
}


@pytest.mark.parametrize("mask", CUDNN_MASKS.values(), ids=CUDNN_MASKS)
def test_cudnn_and_its_gradients_equal_a_dense_softmax(mask):
    if not core._has_cudnn():
        pytest.skip("needs a CUDA device")
    q, k, v, readout = (x.astype(jnp.bfloat16) for x in arrays())

    def both(function, *qkv):
        def score(*qkv):
            out = function(*qkv, mask)
            return jnp.sum((out * readout).astype(jnp.float32)), out

        return jax.jit(jax.grad(score, argnums=(0, 1, 2), has_aux=True))(*qkv)

    def by_hand(q, k, v, mask):
        return dense(q, k, v, dense_mask(mask, QUERIES, KEYS))

    expected = both(by_hand, *(x.astype(jnp.float32) for x in (q, k, v)))
    found = jax.tree.map(lambda x: x.astype(jnp.float32), both(attend, q, k, v))
    chex.assert_trees_all_close(found, expected, atol=2e-2)  # bfloat16 has 8 bits
    assert "cudnn" in jax.jit(attend).lower(q, k, v, mask).compile().as_text()
