"""Attention's conditions, bias, grouped heads and projections against a dense softmax by hand."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.nn.attention import (
    Attention,
    AttentionMask,
    KvCache,
    LayerCache,
    attend,
    core,
    probabilities,
)
from perception_jax.nn.rope import Rope
from perception_jax.nn.taps import LayerTap
from tests.arrays import drawn, normal

B, T, K, N, M, H = 2, 5, 7, 4, 2, 6
SEGMENTS = np.array([[0, 0, 1, 1, 2, 2, 2], [3, 3, 3, 3, 3, 4, 4]])
START = np.array([2, 1])


def visible(of_pair):
    """[B, 1, T, K] from a function of (example, query, key)."""
    pairs = [[[of_pair(b, t, k) for k in range(K)] for t in range(T)] for b in range(B)]
    return np.array(pairs)[:, None]


ARRAY = np.random.default_rng(5).uniform(size=(1, N, T, K)) < 0.7
MASKS = {
    "causal": (
        AttentionMask(causal=True, start=jnp.asarray(START)),
        visible(lambda b, t, k: k <= START[b] + t),
    ),
    "window": (
        AttentionMask(window=2, start=1),
        visible(lambda b, t, k: abs(1 + t - k) < 2),
    ),
    "causal window, lengths": (
        AttentionMask(causal=True, window=3, start=jnp.int32(2), lengths=jnp.array([7, 4])),
        visible(lambda b, t, k: 0 <= 2 + t - k < 3 and k < (7, 4)[b]),
    ),
    "segments": (
        AttentionMask(segments=jnp.asarray(SEGMENTS[:, 1:6]), key_segments=jnp.asarray(SEGMENTS)),
        visible(lambda b, t, k: SEGMENTS[b, t + 1] == SEGMENTS[b, k]),
    ),
    "an array of each head, lengths": (
        AttentionMask(array=jnp.asarray(ARRAY), lengths=jnp.array([3])),
        ARRAY & (np.arange(K) < 3),
    ),
}
BIAS = {"none": None, "of heads": (1, N, T, K), "of examples": (B, 1, T, K)}


def dense(q, k, v, mask, bias):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bknh->bntk", q, k) * H**-0.5
    scores = jnp.where(mask, scores if bias is None else scores + bias, -1e30)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bntk,bknh->btnh", weights, v), weights


@pytest.mark.parametrize(
    ("mask", "bias", "kv_heads", "long"),
    [
        ("causal", "of heads", M, False),
        ("window", "none", N, False),
        ("causal window, lengths", "of examples", 1, True),
        ("segments", "none", M, True),
        ("an array of each head, lengths", "of heads", M, True),
    ],
)
def test_masks_bias_and_grouped_heads_equal_a_dense_softmax(
    mask, bias, kv_heads, long, monkeypatch
):
    """Outputs and gradients, also where the backward pass computes the probabilities again."""
    if long:
        monkeypatch.setattr(core, "LONG", 0)
    mask, by_hand = MASKS[mask]
    bias = None if BIAS[bias] is None else normal(9, *BIAS[bias])
    q, k, v = normal(1, B, T, N, H), normal(2, B, K, kv_heads, H), normal(3, B, K, kv_heads, H)
    readout = normal(4, B, T, N, H)

    @jax.jit
    def both(*inputs):
        def slopes(function):
            def score(*inputs):
                out = function(*inputs)
                return jnp.sum(out * readout), out

            return jax.grad(score, argnums=(0, 1, 2, 3), has_aux=True)(*inputs)

        ours = slopes(lambda q, k, v, bias: attend(q, k, v, mask, bias=bias))
        return ours, slopes(lambda q, k, v, bias: dense(q, k, v, by_hand, bias)[0])

    found, expected = both(q, k, v, bias)
    chex.assert_trees_all_close(found, expected, atol=2e-6)


@pytest.mark.parametrize("mask", ["causal", "segments", "an array of each head, lengths"])
def test_rows_of_probabilities_are_those_of_the_dense_softmax(mask):
    mask, by_hand = MASKS[mask]
    q, k, bias = normal(1, B, T, N, H), normal(2, B, K, M, H), normal(9, 1, N, T, K)
    rows = [None, jnp.array([3, 0]), jnp.array([[1, 4], [0, 2]])]

    @jax.jit
    def both(q, k, bias):
        found = [probabilities(q, k, mask, index, bias=bias) for index in rows]
        return found, dense(q, k, k, by_hand, bias)[1]

    (whole, shared, own), expected = both(q, k, bias)
    chex.assert_trees_all_close(whole, expected, atol=1e-6)
    chex.assert_trees_all_close(shared, np.asarray(expected)[:, :, [3, 0]], atol=1e-6)
    first, second = np.asarray(expected)
    by_example = np.stack([first[:, [1, 4]], second[:, [0, 2]]])
    chex.assert_trees_all_close(own, by_example, atol=1e-6)


def test_the_layer_attends_to_other_tokens_with_heads_of_any_width():
    """Projections by hand; queries of one example are shared by all; a probe reaches the values."""
    options = {"head_width": H, "kv_heads": M, "keys_width": 10, "bias": False, "out_bias": True}
    layer = drawn(lambda: Attention(12, N, **options, rngs=nnx.Rngs(0)))
    shapes = {path: leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(layer))}
    assert shapes == {
        ("q_proj", "kernel"): (12, N * H),
        ("k_proj", "kernel"): (10, M * H),
        ("v_proj", "kernel"): (10, M * H),
        ("out_proj", "kernel"): (N * H, 12),
        ("out_proj", "bias"): (12,),
    }
    x, keys, values = normal(1, 1, T, 12), normal(2, B, K, 10), normal(3, B, K, 10)
    probe = normal(4, B, N, T, K)

    @jax.jit
    def both(layer, x, keys, values, probe):
        out = layer(x, keys=keys, values=values, tap=LayerTap(probe=probe))
        q = jnp.repeat(x @ layer.q_proj.kernel[...], B, axis=0).reshape(B, T, N, H)
        k = (keys @ layer.k_proj.kernel[...]).reshape(B, K, M, H)
        v = (values @ layer.v_proj.kernel[...]).reshape(B, K, M, H)
        mixed, weights = dense(q, k, v, True, None)
        mixed += jnp.einsum("bntk,bknh->btnh", probe, jnp.repeat(v, N // M, axis=2))
        return out, weights, layer.out_proj(mixed.reshape(B, T, N * H))

    out, weights, expected = both(layer, x, keys, values, probe)
    chex.assert_trees_all_close(out.rows, weights, atol=1e-6)
    chex.assert_trees_all_close(out.x, expected, atol=1e-5)


def test_a_cache_of_ragged_texts_gives_what_the_whole_texts_give():
    """Right-padded prompts, then one token at a time, rotary positions of each example."""
    layer = drawn(lambda: Attention(8, 4, kv_heads=2, rngs=nnx.Rngs(0)))
    lengths, more, capacity = np.array([2, 4]), 3, 8
    x = normal(1, B, capacity, 8)
    angles = normal(2, capacity, 2)
    causal = AttentionMask(causal=True)

    def rope(positions):
        return Rope(jnp.cos(angles)[positions], jnp.sin(angles)[positions])

    @jax.jit
    def at_once(layer, x):
        return layer(x, mask=causal, rope=rope(jnp.tile(jnp.arange(capacity), (B, 1)))).x

    whole, x = np.asarray(at_once(layer, x)), np.asarray(x)
    cache = KvCache.empty(depth=3, batch=B, capacity=capacity, kv_heads=2, head_width=2)

    @jax.jit
    def extend(cache, x, lengths):
        positions = jnp.minimum(cache.lengths[:, None] + jnp.arange(x.shape[1]), capacity - 1)
        at = LayerCache(stack=cache, layer=1)
        out = layer(x, mask=causal, rope=rope(positions), cache=at)
        return out.x, out.cache.stack.with_lengths(lengths)

    first, cache = extend(cache, x[:, :4], jnp.asarray(lengths))
    chex.assert_trees_all_close(first[1], whole[1, :4], atol=1e-6)
    chex.assert_trees_all_close(first[0, :2], whole[0, :2], atol=1e-6)
    for step in range(more):
        now = lengths + step
        token = np.stack([x[b, at] for b, at in enumerate(now)])[:, None]
        y, cache = extend(cache, token, jnp.asarray(now + 1))
        expected = np.stack([whole[b, at] for b, at in enumerate(now)])[:, None]
        chex.assert_trees_all_close(y, expected, atol=1e-6)
    assert not np.asarray(cache.keys)[[0, 2]].any(), "another layer was written to"
    full = cache.with_lengths(jnp.array([7, 8]))
    y, _ = extend(full, x[:, :1], full.lengths)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[0]).all()
    with pytest.raises(ConfigError, match="cannot take 9 at once"):
        LayerCache(stack=cache, layer=0).write(*[normal(1, B, 9, 2, 2)] * 2)
    segments = AttentionMask(causal=True, segments=jnp.zeros((B, 1), int))
    with pytest.raises(ConfigError, match="keeps no segment ids"):
        layer(jnp.asarray(x[:, :1]), mask=segments, cache=LayerCache(stack=cache, layer=0))


def test_what_does_not_fit_is_refused():
    q, k = normal(1, B, T, N, H), normal(2, B, K, 3, H)
    with pytest.raises(ConfigError, match="multiple of the 3 key-value heads, found 4"):
        attend(q, k, k)
    k = normal(2, B, K, M, H)
    for mask, match in (
        (AttentionMask(causal=True), "5 queries and 7 keys"),
        (AttentionMask(window=0, start=0), "at least 1 position"),
        (AttentionMask(segments=jnp.zeros((B, T), int)), "give `key_segments`"),
        (AttentionMask(key_segments=jnp.zeros((B, K), int)), "expected `segments`"),
    ):
        with pytest.raises(ConfigError, match=match):
            attend(q, k, k, mask)
    with pytest.raises(ConfigError, match="found 5 and 5"):
        Attention(12, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="found 4 and 3"):
        Attention(12, 4, kv_heads=3, rngs=nnx.Rngs(0))
