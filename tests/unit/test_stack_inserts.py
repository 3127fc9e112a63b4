"""Inserts between the two steps of a stack's blocks, against a loop over the layers."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.nn import stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import Linear
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.taps import LayerTap, Taps
from perception_jax.nn.transformer import Block
from tests.arrays import drawn, normal

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 8, 2
DEPTH = 8


class Mixer(nnx.Module):
    """Tokens take from what is given, by softmax; nothing like it can hide in a block."""

    def __init__(self, rngs):
        self.map = Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, given):
        return x + 0.5 * self.attention(x, given)[:, 0] @ self.map(given["states"])

    def attention(self, x, given):
        return jax.nn.softmax(x @ self.map(given["states"]).swapaxes(1, 2))[:, None]


def make_blocks(depth, layers, key=0):
    rngs = nnx.Rngs(params=key)

    def block(rngs):
        attention = Attention(WIDTH, HEADS, rngs=rngs)
        return Block(WIDTH, attention, Mlp(WIDTH, 16, act="gelu", rngs=rngs), eps=1e-5)

    base = stack.init(block, depth, rngs=rngs)
    return stack.Inserted(base, stack.init(Mixer, len(layers), rngs=rngs), layers)


blocks_of = functools.cache(lambda depth, layers: drawn(lambda: make_blocks(depth, layers)))
X = normal(1, BATCH, TOKENS, WIDTH)


def given(rows=BATCH):
    return {"states": normal(2, rows, 3, WIDTH)}


def loop(blocks, x, given, taps, *, depth=DEPTH, repeats=1):
    """One layer after the other; everything is recorded and then looked up by its number."""
    records = {"hidden": {0: x}, "attention": {}, "inserts": {}}
    for layer in range(depth):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks.base)
        tap = LayerTap(rows=taps.rows)
        if taps.probes is not None and layer in taps.attention:
            tap = LayerTap(rows=taps.rows, probe=taps.probes[taps.attention.index(layer)])
        out = block.attention_step(x, stack.Layer(tap=tap))
        x, records["attention"][layer] = out.x, out.attention
        if layer in blocks.layers:
            place = blocks.layers.index(layer)
            insert = jax.tree.map(lambda leaf, place=place: leaf[place], blocks.inserts)
            x = jnp.repeat(x, repeats, axis=0) if place == 0 else x
            records["inserts"][layer] = insert.attention(x, given)
            x = insert(x, given)
        x = records["hidden"][layer + 1] = block.mlp_step(x).x
    wanted = {name: [kept[k] for k in getattr(taps, name)] for name, kept in records.items()}
    return stack.StackOutput(
        x=x, **{name: jnp.stack(rows) if rows else None for name, rows in wanted.items()}
    )


def slopes(function, blocks, x, given, taps):
    """Gradients of a score of the output for all that goes in, and the output."""
    readout = normal(3, TOKENS, WIDTH)

    def score(blocks, x, given, probes):
        out = function(blocks, x, given, taps if probes is None else taps.with_probes(probes))
        return jnp.sum(jnp.tanh(out.x) * readout), out

    gradient = jax.jit(jax.grad(score, argnums=(0, 1, 2, 3), has_aux=True))
    return gradient(blocks, x, given, taps.probes)


PLACES = {
    "all": tuple(range(DEPTH)),
    "odd": (1, 3, 5, 7),
    "aperiodic": (0, 3, 4, 6),
    "late": (5, 7),
    "first": (0,),
    "last": (7,),
}


@pytest.mark.parametrize("places", PLACES)
def test_a_stack_with_inserts_is_a_loop_over_its_layers(places):
    blocks = blocks_of(DEPTH, PLACES[places])
    run = jax.jit(lambda *inputs: stack.run(*inputs[:2], context=stack.Context(given=inputs[2])))
    expected = jax.jit(lambda *inputs: loop(*inputs, Taps()))(blocks, X, given())
    chex.assert_trees_all_close(run(blocks, X, given()), expected, atol=1e-5)


TAPPED = {
    "odd": {"attention": tuple(range(DEPTH)), "hidden": (0,), "inserts": (1, 3, 5, 7)},
    "aperiodic": {"attention": (1, 4, 5), "hidden": (0, 2, 3, 6), "inserts": (4, 6)},
}
"""Two tapped layers in a pattern that repeats; and hardly two layers alike."""


@pytest.mark.parametrize("places", TAPPED)
def test_taps_probes_and_gradients_are_the_loops(places):
    blocks, tapped = blocks_of(DEPTH, PLACES[places]), TAPPED[places]
    shape = (len(tapped["attention"]), BATCH, HEADS, 2, TOKENS)
    probes = normal(4, *shape)
    taps = Taps(**tapped, rows=jnp.array([4, 1]), probes=probes)

    def run(blocks, x, given, taps):
        return stack.run(blocks, x, context=stack.Context(given=given), taps=taps)

    found, expected = (slopes(f, blocks, X, given(), taps) for f in (run, loop))
    chex.assert_trees_all_close(found, expected, atol=2e-5)
    of_inserts = found[0][0].inserts.map.kernel[...]
    assert np.abs(of_inserts).max(axis=(1, 2)).min() > 1e-4


@pytest.mark.parametrize(("places", "depth"), [("odd", 7), ("aperiodic", 4)])
def test_a_prefix_with_remat_and_a_batch_that_grows(places, depth):
    blocks = blocks_of(DEPTH, PLACES[places])
    start = blocks.layers[0] + 1
    taps = Taps(
        attention=tuple(range(start, depth, 2)),
        hidden=tuple(range(start + 1, depth + 1)),
        inserts=tuple(layer for layer in blocks.layers if layer < depth),
    )

    def run(blocks, x, given, taps):
        context = stack.Context(given=given, repeats=3)
        return stack.run(blocks, x, context=context, taps=taps, depth=depth, remat=True)

    by_loop = functools.partial(loop, depth=depth, repeats=3)
    found, expected = (slopes(f, blocks, X, given(3 * BATCH), taps) for f in (run, by_loop))
    chex.assert_trees_all_close(found, expected, atol=2e-5)
    assert found[1].x.shape[0] == 3 * BATCH


def test_without_a_context_it_is_the_stack_itself():
    blocks = blocks_of(DEPTH, PLACES["odd"])
    taps = Taps(attention=(2,), hidden=(0, 5))
    run = jax.jit(lambda blocks: stack.run(blocks, X, taps=taps))
    chex.assert_trees_all_equal(run(blocks), run(blocks.base))
    assert stack.depth_of(blocks) == DEPTH
    with pytest.raises(ConfigError, match="no inserts that could use it"):
        stack.run(blocks.base, X, context=stack.Context(given=given()))


def test_a_batch_that_never_grows_is_refused():
    blocks, context = blocks_of(4, (2,)), stack.Context(given=given(2 * BATCH), repeats=2)
    with pytest.raises(ConfigError, match="first insert is in layer 2, but only 2 layers run"):
        stack.run(blocks, X, context=context, depth=2)


def scans(blocks_in_all, layers, *, repeats=1, steered=True, **options):
    """Lengths of the scans that a stack becomes."""
    blocks = jax.eval_shape(lambda: make_blocks(blocks_in_all, layers))
    context = stack.Context(given=given(repeats * BATCH), repeats=repeats) if steered else None
    jaxpr = jax.make_jaxpr(lambda blocks: stack.run(blocks, X, context=context, **options))(blocks)
    return [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]


ODD = tuple(range(1, 24, 2))


def test_equal_layers_share_a_scan():
    assert scans(24, ODD) == [12]
    assert scans(24, ODD, remat=True) == [12]
    assert scans(24, tuple(range(0, 24, 2))) == [12]
    assert scans(24, tuple(range(2, 24, 3))) == [8]
    assert scans(24, tuple(range(24))) == scans(24, ODD, steered=False) == [24]
    assert scans(24, (0,)) == [1, 23]
    assert scans(24, (23,)) == [23, 1]
    # The layer in which the batch grows is by itself and no loop.
    assert scans(24, ODD, repeats=2) == [1, 11]
    assert scans(24, tuple(range(12, 24)), repeats=2) == [12, 11]
    # A tapped layer is of a kind of its own.
    assert len(scans(24, ODD, taps=Taps(attention=(-1,)))) <= 3
    assert len(scans(24, ODD, taps=Taps(inserts=ODD))) == 1
    assert scans(24, ODD, depth=10) == [5]


@pytest.mark.parametrize("layers", [(1, 3, 5, 8, 10, 12, 14, 17, 19, 21, 23, 26)])
def test_uneven_places_make_few_scans(layers):
    """Twelve adapters in the 27 blocks of a SigLIP."""
    found = scans(27, layers)
    assert len(found) <= 7
