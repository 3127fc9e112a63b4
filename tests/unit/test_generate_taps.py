"""Attention rows and their gradients in prefill, extend and decode, against a dense softmax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.errors import ConfigError
from perception_jax.generate import decode, extend, prefill
from perception_jax.nn.rope import rotary
from perception_jax.nn.taps import Taps
from perception_jax.testing.tiny_llama import CONFIG
from tests.unit.test_generate import PROMPTS, model

CAPACITY, STEPS, LAYERS = 16, 3, (0, 2)
TAPS = Taps(attention=LAYERS)
ROWS = (1, 2)
COUNTS = [len(PROMPTS[row]) for row in ROWS]
IDS = np.zeros((2, 12), np.int32)
for _at, _row in enumerate(ROWS):
    IDS[_at, 12 - COUNTS[_at] :] = PROMPTS[_row]
MASK = IDS > 0


@functools.partial(jax.jit, static_argnames="taps_layers")
def run_prefill(model, ids, mask, rows, taps_layers=()):
    taps = Taps(attention=taps_layers, rows=rows) if taps_layers else None
    return prefill(model, ids, mask, capacity=CAPACITY, taps=taps)


def started(model, rows, taps_layers=()):
    return run_prefill(model, IDS, MASK, rows, taps_layers)


@functools.partial(jax.jit, static_argnames="tapped")
def continued(model, state, tapped=False):
    return decode(model, state, steps=STEPS, taps=TAPS if tapped else None)


@functools.cache
def dense(text: tuple[int, ...]) -> list[np.ndarray]:
    """Probabilities [N, T, T] of each tapped layer, from its input by hand."""

    @jax.jit
    def probabilities(model, ids):
        hidden = model(ids, taps=Taps(hidden=LAYERS)).hidden
        rope = rotary(jnp.arange(ids.shape[1]), CONFIG.head_width)
        found = []
        for layer, x in zip(LAYERS, hidden, strict=True):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], model.blocks)
            x = block.norm1(x)
            q, k = (
                rope.rotate(project(x).reshape(1, -1, heads, CONFIG.head_width))
                for project, heads in (
                    (block.attention.q_proj, CONFIG.heads),
                    (block.attention.k_proj, CONFIG.kv_heads),
                )
            )
            k = jnp.repeat(k, CONFIG.heads // CONFIG.kv_heads, axis=2)
            scores = jnp.einsum("btnh,bknh->bntk", q, k) * CONFIG.head_width**-0.5
            causal = np.tril(np.ones(scores.shape[-2:], bool))
            found.append(jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)[0])
        return found

    padded = np.zeros((1, CAPACITY), np.int32)
    padded[0, : len(text)] = text
    return [np.asarray(layer) for layer in probabilities(model(), padded)]


def test_rows_of_prefill_and_decode_are_those_of_a_dense_softmax():
    last = jnp.asarray(COUNTS)[:, None] - 1
    out = started(model(), last, LAYERS)
    assert out.attention.shape == (2, 2, 4, 1, 12)
    steps = continued(model(), out.state, tapped=True)
    assert steps.attention.shape == (STEPS, 2, 2, 4, 1, CAPACITY)
    for row, count in enumerate(COUNTS):
        text = (*PROMPTS[ROWS[row]].tolist(), *np.asarray(steps.ids)[row].tolist())
        for at, expected in enumerate(dense(text)):
            found = np.asarray(out.attention)[at, row, :, 0]
            np.testing.assert_allclose(found, expected[:, count - 1, :12], atol=1e-5)
            found = np.asarray(steps.attention)[:, at, row, :, 0]
            new = expected[:, count : count + STEPS].swapaxes(0, 1)
            np.testing.assert_allclose(found, new, atol=1e-5)


def test_outputs_with_taps_are_bit_equal_to_those_without():
    last = jnp.asarray(COUNTS)[:, None] - 1
    plain, tapped = started(model(), last), started(model(), last, LAYERS)
    for a, b in zip(jax.tree.leaves(plain.state), jax.tree.leaves(tapped.state), strict=True):
        np.testing.assert_array_equal(a, b)
    plain, tapped = continued(model(), plain.state), continued(model(), plain.state, tapped=True)
    np.testing.assert_array_equal(plain.ids, tapped.ids)
    np.testing.assert_array_equal(plain.log_probs, tapped.log_probs)
    for a, b in zip(jax.tree.leaves(plain.state), jax.tree.leaves(tapped.state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_gradient_through_the_row_of_a_cached_token_is_that_of_the_whole_text():
    """Of the next token's logits with respect to probabilities, as ViCrop needs it."""
    ids = jnp.asarray(np.stack([PROMPTS[1], PROMPTS[1][::-1]]))
    state = jax.jit(functools.partial(prefill, capacity=CAPACITY))(model(), ids[:, :-1]).state
    readout = jnp.asarray(np.random.default_rng(0).normal(size=(2, CONFIG.vocab_size)))

    def cached(probes):
        taps = Taps(attention=LAYERS, rows=jnp.array([0])).with_probes(probes)
        return (extend(model(), state, ids[:, -1:], taps=taps).state.logits * readout).sum()

    def whole(probes):
        taps = Taps(attention=LAYERS, rows=jnp.array([8])).with_probes(probes)
        return (model()(ids, taps=taps).logits[:, -1] * readout).sum()

    ours = jax.jit(jax.grad(cached))(jnp.zeros((2, 2, 4, 1, CAPACITY)))
    expected = jax.jit(jax.grad(whole))(jnp.zeros((2, 2, 4, 1, 9)))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours[..., :9], expected, atol=1e-4)


def test_decode_records_attention_alone():
    state = started(model(), jnp.zeros((2, 1), int)).state
    with pytest.raises(ConfigError, match="taps on attention alone"):
        decode(model(), state, steps=1, taps=Taps(hidden=(0,)))
