"""Taps against a dense re-computation by hand, under jit, scan and remat."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.nn import stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.pooling import MapHead
from perception_jax.nn.taps import Taps
from perception_jax.nn.transformer import Block
from tests.arrays import drawn, normal

DEPTH, BATCH, TOKENS, WIDTH, HEADS = 4, 3, 7, 16, 2


@pytest.fixture(scope="module")
def blocks():
    def make(rngs):
        attention = Attention(WIDTH, HEADS, rngs=rngs)
        return Block(WIDTH, attention, Mlp(WIDTH, 32, act="gelu", rngs=rngs), eps=1e-5)

    return drawn(lambda: stack.init(make, DEPTH, rngs=nnx.Rngs(params=0)))


@pytest.fixture(scope="module")
def x():
    return normal(1, BATCH, TOKENS, WIDTH)


@jax.jit
def dense(blocks, x, mask=None, extra=None):
    """Block by block with whole attention matrices; `extra` [L B N T T] is added to them."""
    hidden, attention = [x], []
    for layer in range(DEPTH):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        y = block.norm1(x)
        split = (BATCH, TOKENS, HEADS, WIDTH // HEADS)
        attn = block.attention
        q, k, v = (p(y).reshape(split) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        scores = jnp.einsum("btnh,bknh->bntk", q, k) * (WIDTH // HEADS) ** -0.5
        if mask is not None:
            scores = jnp.where(mask, scores, -1e30)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        attention.append(weights)
        if extra is not None:
            weights = weights + extra[layer]
        mixed = jnp.einsum("bntk,bknh->btnh", weights, v).reshape(x.shape)
        x = x + attn.out_proj(mixed)
        x = x + block.mlp(block.norm2(x))
        hidden.append(x)
    return hidden, attention


CAUSAL = jnp.tril(jnp.ones((1, 1, TOKENS, TOKENS), bool))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("rows", [None, [0, 5], [[0, 6], [3, 1], [2, 2]]])
def test_records_equal_dense_softmax(blocks, x, mask, rows, remat):
    rows = None if rows is None else jnp.asarray(rows)
    taps = Taps(attention=(3, 0, -3), hidden=(-5, -1, 2), rows=rows)
    out = jax.jit(lambda b, x, t: stack.run(b, x, mask=mask, taps=t, remat=remat))(blocks, x, taps)
    hidden, attention = dense(blocks, x, mask)
    chex.assert_trees_all_close(out.x, hidden[-1], atol=1e-5)
    chex.assert_trees_all_close(out.hidden, np.stack([hidden[i] for i in (0, 2, 4)]), atol=1e-5)
    expected = np.stack([attention[i] for i in (0, 1, 3)])
    if rows is not None:
        index = np.broadcast_to(rows, (BATCH, rows.shape[-1]))
        expected = np.take_along_axis(expected, index[None, :, None, :, None], axis=3)
    chex.assert_trees_all_close(out.attention, expected, atol=1e-6)


@pytest.mark.parametrize("remat", [False, True])
def test_probe_gradient_equals_gradient_of_dense_probabilities(blocks, x, remat):
    taps = Taps(attention=(1, 2), rows=jnp.array([4, 0]))
    readout = normal(2, *x.shape)

    def score(probes):
        out = stack.run(blocks, x, taps=taps.with_probes(probes), remat=remat)
        return jnp.sum(readout * jnp.tanh(out.x))

    probes = taps.zeros(depth=DEPTH, batch=BATCH, heads=HEADS, keys=TOKENS)
    ours = jax.jit(jax.grad(score))(probes)

    def dense_score(extra):
        return jnp.sum(readout * jnp.tanh(dense(blocks, x, extra=extra)[0][-1]))

    theirs = jax.jit(jax.grad(dense_score))(jnp.zeros((DEPTH, BATCH, HEADS, TOKENS, TOKENS)))
    chex.assert_trees_all_close(ours, np.asarray(theirs)[1:3][:, :, :, [4, 0]], atol=1e-5)
    assert np.abs(ours).max() > 1e-3


def test_probes_of_rows_of_each_example(blocks, x):
    probes = normal(2, 2, BATCH, HEADS, 2, TOKENS)
    rows = jnp.array([4, 1])
    shared, own = (
        Taps(attention=(0, 2), rows=rows, probes=probes)
        for rows in (rows, jnp.broadcast_to(rows, (BATCH, 2)))
    )
    run = jax.jit(lambda blocks, x, taps: stack.run(blocks, x, taps=taps))
    chex.assert_trees_all_close(run(blocks, x, own), run(blocks, x, shared), atol=1e-6)
    zeros = own.zeros(depth=DEPTH, batch=BATCH, heads=HEADS, keys=TOKENS)
    assert zeros.shape == probes.shape


def test_taps_leave_the_output_alone(blocks, x):
    plain = jax.jit(stack.run)(blocks, x)
    tapped = jax.jit(stack.run)(blocks, x, taps=Taps(attention=(0, 2), rows=jnp.array([1])))
    chex.assert_trees_all_close(plain.x, tapped.x, atol=1e-6)


def test_a_pooling_head_records_its_attention_and_adds_the_probe(x):
    head = drawn(lambda: MapHead(WIDTH, HEADS, 32, act="gelu", eps=1e-6, rngs=nnx.Rngs(0)), 5)
    pool = jax.jit(lambda head, x, tap: head(x, tap=tap))
    fast, nothing = pool(head, x, None)
    assert nothing is None
    probe = normal(3, BATCH, HEADS, TOKENS)

    @jax.jit
    def by_hand(head, x, probe):
        query = head.q_proj(head.probe[...]).reshape(HEADS, -1)
        k, v = (p(x).reshape(BATCH, TOKENS, HEADS, -1) for p in (head.k_proj, head.v_proj))
        weights = jnp.exp(jnp.einsum("nh,btnh->bnt", query, k) * (WIDTH // HEADS) ** -0.5)
        weights = weights / weights.sum(-1, keepdims=True)
        y = head.out_proj(jnp.einsum("bnt,btnh->bnh", weights + probe, v).reshape(BATCH, WIDTH))
        return y + head.mlp(head.norm(y)), weights

    for taps, added in (
        (Taps(pool=True), jnp.zeros_like(probe)),
        (Taps().with_pool_probe(probe), probe),  # which records too
    ):
        pooled, recorded = pool(head, x, taps.of_pool)
        expected, weights = by_hand(head, x, added)
        chex.assert_trees_all_close(recorded, weights, atol=1e-6)
        chex.assert_trees_all_close(pooled, expected, atol=1e-5)
    chex.assert_trees_all_close(pool(head, x, Taps(pool=True).of_pool)[0], fast, atol=1e-6)
    assert Taps(attention=(0,)).of_pool is None


def test_depth_runs_a_prefix(blocks, x):
    out = jax.jit(lambda blocks, x: stack.run(blocks, x, depth=2))(blocks, x)
    chex.assert_trees_all_close(out.x, dense(blocks, x)[0][2], atol=1e-5)


def test_layer_outside_the_stack_is_named(blocks, x):
    with pytest.raises(ConfigError, match=r"layer 4, but the stack has 4"):
        stack.run(blocks, x, taps=Taps(attention=(4,)))


def test_memory_grows_with_rows_not_with_the_square_of_tokens(blocks):
    """The recorded attention is all that a tap adds to what the compiled program returns."""
    long = jax.ShapeDtypeStruct((1, 512, WIDTH), jnp.float32)

    def output_bytes(rows):
        taps = Taps(attention=(2,), rows=jnp.arange(rows))
        compiled = jax.jit(lambda b, x: stack.run(b, x, taps=taps)).lower(blocks, long).compile()
        return compiled.memory_analysis().output_size_in_bytes

    growth = output_bytes(9) - output_bytes(1)
    assert growth == pytest.approx(8 * HEADS * 512 * np.dtype(np.float32).itemsize, rel=0.01)
