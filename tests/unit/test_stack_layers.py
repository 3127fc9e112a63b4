"""What a stack's layers are given and give, against loops over the layers written out here."""

from __future__ import annotations

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.nn import stack
from perception_jax.nn.attention import Attention, AttentionMask, KvCache
from perception_jax.nn.linear import Linear
from perception_jax.nn.mlp import GatedMlp, Mlp
from perception_jax.nn.norms import RmsNorm
from perception_jax.nn.rope import rotary
from perception_jax.nn.taps import Taps
from perception_jax.nn.transformer import Block
from tests.arrays import drawn, normal

B, T, D, DEPTH = 2, 5, 8, 4
CAUSAL = AttentionMask(causal=True)


X = normal(1, B, T, D)
MEMORY = normal(2, B, 3, 6)


def block(rngs, *, cross=False, dropout=0.0, norm="pre"):
    attention = Attention(D, 2, rngs=rngs)
    other = Attention(D, 2, keys_width=6, rngs=rngs) if cross else None
    mlp = Mlp(D, 12, act="gelu", rngs=rngs)
    return Block(D, attention, mlp, eps=1e-5, norm=norm, cross=other, dropout=dropout)


@functools.cache
def stacked(depth=DEPTH, **options):
    make = functools.partial(block, **options)
    return drawn(lambda: stack.init(make, depth, rngs=nnx.Rngs(params=0)))


def layer_of(blocks, index):
    return jax.tree.map(lambda leaf: leaf[index], blocks)


def through(block, x, layer=None):
    """All steps of one block."""
    for step in block.steps:
        x = step(x, layer or stack.Layer()).x
    return x


# --- Decoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True], ids=["stacked", "separate"])
def test_a_causal_grouped_query_stack_with_a_cache_equals_the_same_without(apart):
    """Llama's block: RMS norms, four heads on two keys, no biases, half-split rotary positions."""

    def make(rngs):
        attention = Attention(D, 4, kv_heads=2, head_width=4, bias=False, rngs=rngs)
        mlp = GatedMlp(D, 12, bias=False, rngs=rngs)
        return Block(D, attention, mlp, eps=1e-6, norm_type=RmsNorm)

    class Decoder(nnx.Module):
        def __init__(self):
            self.blocks = stack.init(make, 3, rngs=nnx.Rngs(params=0))

    model = drawn(Decoder)
    blocks = (stack.separate(model, keep=True) if apart else model).blocks

    @jax.jit
    def run(blocks, x, cache):
        start = 0 if cache is None else cache.lengths[:, None]
        positions = start + jnp.arange(x.shape[1])
        return stack.run(blocks, x, mask=CAUSAL, rope=rotary(positions, 4), cache=cache)

    whole = run(blocks, X, None)
    assert whole.cache is None
    cache = KvCache.empty(depth=3, batch=B, capacity=T + 2, kv_heads=2, head_width=4)
    found = []
    for first, last in ((0, 3), (3, 4), (4, 5)):
        out = run(blocks, np.asarray(X)[:, first:last], cache)
        cache = out.cache
        found.append(out.x)
        assert cache.lengths.tolist() == [last] * B
    chex.assert_trees_all_close(np.concatenate(found, axis=1), np.asarray(whole.x), atol=1e-5)


def test_windows_and_full_attention_by_layer():
    blocks, layout = stacked(), ("window", "window", "full", "window")
    masks = {"window": AttentionMask(segments=jnp.array([[0, 0, 1, 1, 1]] * B)), "full": None}
    turns = {"window": rotary(jnp.array([0, 1, 0, 1, 2]), 4), "full": None}

    @jax.jit
    def run(blocks, x):
        return stack.run(blocks, x, mask=masks, rope=turns, layout=layout).x

    @jax.jit
    def loop(blocks, x):
        for index, name in enumerate(layout):
            given = stack.Layer(mask=masks[name], rope=turns[name])
            x = through(layer_of(blocks, index), x, given)
        return x

    chex.assert_trees_all_close(run(blocks, X), loop(blocks, X), atol=1e-5)
    with pytest.raises(ConfigError, match=r"masks: .* \['window'\] and a layer of kind 'full'"):
        stack.run(blocks, X, mask={"window": None}, layout=layout)
    with pytest.raises(ConfigError, match="a layer without a layout"):
        stack.run(blocks, X, mask=masks)
    with pytest.raises(ConfigError, match="expected 4 names, one a layer, found 1"):
        stack.run(blocks, X, layout=("full",))


# --- Cross-attention ----------------------------------------------------------------------------

MEMORY_MASK = AttentionMask(lengths=jnp.array([3, 1]))


@functools.cache
def mixed():
    stacks = {"cross": stacked(2, cross=True), "plain": stacked(2)}
    return stack.Mixed(stacks, ("cross", "plain") * 2)


def by_kinds(blocks):
    """The blocks in the order of the layout."""
    return [layer_of(blocks.stacks[name], place // 2) for place, name in enumerate(blocks.layout)]


def test_cross_attention_in_every_other_layer():
    blocks = mixed()
    taps = Taps(cross=(0, 2), attention=(1,), rows=jnp.array([4, 1]))

    @jax.jit
    def run(blocks, x):
        return stack.run(blocks, x, memory=MEMORY, memory_mask=MEMORY_MASK, taps=taps)

    @jax.jit
    def loop(blocks, x):
        given = stack.Layer(memory=MEMORY, memory_mask=MEMORY_MASK)
        for one in by_kinds(blocks):
            x = through(one, x, given)
        return x

    out = run(blocks, X)
    chex.assert_trees_all_close(out.x, loop(blocks, X), atol=1e-5)
    assert out.cross.shape == (2, B, 2, 2, 3)
    assert out.attention.shape == (1, B, 2, 2, T)
    np.testing.assert_allclose(out.cross[:, 1, :, :, 0], 1.0, atol=1e-6)
    jaxpr = jax.make_jaxpr(lambda blocks: stack.run(blocks, X, memory=MEMORY))(blocks)
    assert [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"] == [2]
    with pytest.raises(ConfigError, match="none was given"):
        stack.run(blocks, X)
    with pytest.raises(ConfigError, match="no block of this stack attends"):
        stack.run(stacked(), X, memory=MEMORY)
    with pytest.raises(ConfigError, match="taps request the cross of a layer"):
        stack.run(blocks, X, memory=MEMORY, taps=Taps(cross=(1,)))
    with pytest.raises(ConfigError, match="expected as many layers of each"):
        stack.Mixed({"plain": stacked(2)}, ("plain",))


# --- Inserts ------------------------------------------------------------------------------------


class Shift(nnx.Module):
    """Adds a map of the tokens times what is given: its place can be seen."""

    def __init__(self, rngs):
        self.map = Linear(D, D, rngs=rngs)

    def __call__(self, x, given):
        return x + jnp.tanh(self.map(x)) * given[:, None, None]

    def attention(self, x, given):
        return jax.nn.softmax(x @ x.swapaxes(1, 2))[:, None] + given[:, None, None, None]


def shifts(count):
    return stack.init(Shift, count, rngs=nnx.Rngs(0))


@functools.cache
def inserted(places, *, cross=False):
    """A group of inserts in layers 1 and 2 for each place, the last of them in layer 2 alone."""
    blocks = stacked(cross=cross)
    for seed, place in enumerate(places):
        layers = (1, 2) if seed == 0 else (2,)
        inserts = drawn(functools.partial(shifts, len(layers)), seed)
        blocks = stack.Inserted(blocks, inserts, layers, place)
    return blocks


def loop_with_inserts(blocks, x, given, positions, repeats):
    """`positions` says before which step each group stands, the innermost first."""
    groups, base = [], blocks
    while isinstance(base, stack.Inserted):
        groups, base = [base, *groups], base.base
    recorded = []
    for index in range(DEPTH):
        block = layer_of(base, index)
        for position, step in enumerate((*block.steps, None)):
            for group, before in zip(groups, positions, strict=True):
                if index in group.layers and before == position:
                    x = jnp.repeat(x, repeats, axis=0) if len(x) != len(given) else x
                    insert = layer_of(group.inserts, group.layers.index(index))
                    recorded.append(((index, groups.index(group)), insert.attention(x, given)))
                    x = insert(x, given)
            x = x if step is None else step(x, stack.Layer(memory=MEMORY)).x
    return x, jnp.stack([rows for _, rows in sorted(recorded, key=lambda one: one[0])])


@pytest.mark.parametrize(
    ("places", "positions", "cross"),
    [
        (("before",), (0,), False),
        (("between",), (1,), False),
        (("after",), (2,), False),
        (("after", "before"), (2, 0), False),
        ((1, "between"), (1, 2), True),
    ],
    ids=str,
)
def test_inserts_before_between_and_after_the_steps(places, positions, cross):
    blocks, repeats = inserted(places, cross=cross), 1 if cross else 3
    given = normal(7, repeats * B)
    context = stack.Context(given=given, repeats=repeats)
    memory = MEMORY if cross else None

    @jax.jit
    def run(blocks, x):
        taps = Taps(inserts=(1, 2))
        return stack.run(blocks, x, context=context, taps=taps, memory=memory)

    out = run(blocks, X)
    x, rows = jax.jit(lambda blocks, x: loop_with_inserts(blocks, x, given, positions, repeats))(
        blocks, X
    )
    chex.assert_trees_all_close(out.x, x, atol=1e-5)
    chex.assert_trees_all_close(out.inserts, rows, atol=1e-5)


def test_an_unknown_place_is_refused():
    for place in ("within", 3):
        insert = drawn(lambda: shifts(1))
        blocks = stack.Inserted(stacked(), insert, (0,), place)
        with pytest.raises(ConfigError, match=f"place of inserts: .* found {place!r}"):
            stack.run(blocks, X, context=stack.Context(given=normal(7, B)))


# --- Parts of a stack, states, dropout, remat ---------------------------------------------------


class Refiner(nnx.Module):
    """A block that is no transformer's: a state that travels, inputs and outputs of its own."""

    attends_memory = False

    def __init__(self, scale):
        self.scale = nnx.Param(scale)

    @property
    def steps(self):
        return (self.step,)

    def step(self, x, layer):
        state = {"boxes": layer.state["boxes"] + layer.inputs["delta"] * self.scale[...]}
        return stack.StepOutput(
            x=x + state["boxes"][:, None, :1], state=state, outputs={"boxes": state["boxes"]}
        )


def test_states_travel_and_layers_have_inputs_and_outputs():
    """As a decoder's that refines boxes from layer to layer; and a suffix takes its own inputs."""
    blocks, delta = Refiner(jnp.array([1.0, 2.0, 3.0])), normal(3, 3, 4)
    first = {"boxes": jnp.zeros((B, 4))}
    run = jax.jit(stack.run, static_argnames="start")
    whole = run(blocks, X, inputs={"delta": delta}, state=first)
    steps = np.asarray(delta) * [[1.0], [2.0], [3.0]]
    expected = np.broadcast_to(np.cumsum(steps, axis=0, dtype=np.float32)[:, None], (3, B, 4))
    chex.assert_trees_all_close(whole.outputs["boxes"], expected, atol=1e-6)
    chex.assert_trees_all_close(whole.state["boxes"], expected[-1], atol=1e-6)
    chex.assert_trees_all_close(
        whole.x, np.asarray(X) + expected.sum(axis=0)[:, None, :1], atol=1e-6
    )
    suffix = run(blocks, X, inputs={"delta": delta}, state=first, start=1)
    chex.assert_trees_all_close(suffix.state["boxes"], expected[-1] - expected[0], atol=1e-6)


def test_a_suffix_continues_a_prefix_and_layers_keep_their_numbers():
    blocks = stacked()
    taps = Taps(hidden=(0, 2, 4), attention=(1, 3))
    whole = jax.jit(lambda blocks, x: stack.run(blocks, x, taps=taps))(blocks, X)

    @jax.jit
    def in_parts(blocks, x):
        head = stack.run(blocks, x, depth=2, taps=Taps(attention=(-1,)))
        return head, stack.run(blocks, head.x, start=2, taps=Taps(hidden=(2, -1), attention=(3,)))

    head, tail = in_parts(blocks, X)
    chex.assert_trees_all_close(tail.x, whole.x, atol=1e-6)
    chex.assert_trees_all_close(tail.hidden, whole.hidden[1:], atol=1e-6)
    rows = np.concatenate([head.attention, tail.attention])
    np.testing.assert_allclose(rows, whole.attention, atol=1e-6)
    with pytest.raises(ConfigError, match=r"tap on layer 1, but 2 to 3 run"):
        stack.run(blocks, X, start=2, taps=Taps(attention=(1,)))
    with pytest.raises(ConfigError, match="layers 2 to 4 were requested, but the stack has 4"):
        stack.run(blocks, X, start=2, depth=3)


def test_dropout_depends_on_the_key_and_the_layer_alone():
    blocks = stacked(dropout=0.3)
    run = jax.jit(
        lambda blocks, x, key, **options: stack.run(blocks, x, key=key, drop_path=0.4, **options),
        static_argnames=("start", "depth", "remat"),
    )
    key = jax.random.key(5)
    whole = run(blocks, X, key).x
    # Other groups of layers, a backward pass that recomputes, a stack in two parts.
    tapped = run(blocks, X, key, taps=Taps(attention=(1,), hidden=(2,)), remat=True)
    chex.assert_trees_all_close(tapped.x, whole, atol=1e-6)
    chex.assert_trees_all_close(run(blocks, tapped.hidden[0], key, start=2).x, whole, atol=1e-6)
    other = run(blocks, X, jax.random.key(6)).x
    assert np.abs(np.asarray(other) - np.asarray(whole)).max() > 0.1
    # Without a key nothing is dropped.
    quiet = jax.jit(lambda blocks: stack.run(blocks, X, drop_path=0.4).x)(blocks)
    plain = jax.jit(lambda blocks: stack.run(blocks, X).x)(stacked())
    chex.assert_trees_all_close(quiet, plain, atol=1e-6)
    # Equal layers with equal inputs drop other units.
    same = jax.tree.map(lambda leaf: jnp.asarray([np.asarray(leaf)[0]] * DEPTH), blocks)
    alone = [np.asarray(run(same, X, key, start=start, depth=1).x) for start in (0, 1)]
    assert np.abs(alone[0] - alone[1]).max() > 0.01


def gradient(remat):
    def loss(blocks, x):
        return jnp.sin(stack.run(blocks, x, remat=remat).x).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def test_remat_by_name_changes_no_gradient():
    blocks = stacked()
    expected = gradient("none")(blocks, X)
    for remat in stack.REMAT:
        chex.assert_trees_all_close(gradient(remat)(blocks, X), expected, atol=1e-5)
    names = "none, dots, dots_no_batch, full, offload"
    with pytest.raises(ConfigError, match=f"one of {names}, found 'half'"):
        gradient("half")(blocks, X)


def test_policies_keep_less_and_less():
    def kept(remat):
        x = jax.ShapeDtypeStruct((16, 24, D), jnp.float32)
        compiled = gradient(remat).lower(stacked(), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    *sizes, offloaded = [kept(remat) for remat in stack.REMAT]
    assert all(more > 1.05 * less for more, less in itertools.pairwise(sizes)), sizes
    assert offloaded <= sizes[-1]  # a CPU's memory is the host's


# --- Separate layers without a second copy ------------------------------------------------------


def test_separate_never_holds_more_than_the_model_and_one_leaf(monkeypatch):
    class Model(nnx.Module):
        def __init__(self):
            self.table = nnx.Param(jnp.zeros((1000,)))
            self.blocks = stack.init(block, 6, rngs=nnx.Rngs(params=0))

    def live():
        return sum(x.nbytes for x in jax.live_arrays())

    model = drawn(Model)
    leaves = [leaf.nbytes for leaf in jax.tree.leaves(model.blocks)]
    run = jax.jit(lambda blocks: stack.run(blocks, X).x)
    expected = run(model.blocks)
    before, seen, unstack = live(), [], jnp.unstack

    def watched(leaf):
        layers = unstack(leaf)
        seen.append(live())
        return layers

    monkeypatch.setattr(jnp, "unstack", watched)
    once = stack.separate(model)
    assert len(seen) == len(leaves)
    assert max(seen) <= before + max(leaves)
    assert live() <= before
    chex.assert_trees_all_close(run(once.blocks), expected, atol=1e-5)
    with pytest.raises(RuntimeError, match="deleted"):
        run(model.blocks)


# --- Loops that copy no stack -------------------------------------------------------------------


@pytest.mark.parametrize("kinds", ["equal", "with inserts in every other layer", "mixed"])
def test_a_forward_pass_copies_no_stack(kinds):
    """XLA on CPU copies a whole stack that is reshaped for a loop, without a word."""
    width, depth = 64, 8

    def make(rngs, cross=False):
        other = Attention(width, 2, keys_width=width, rngs=rngs) if cross else None
        mlp = Mlp(width, 4 * width, act="gelu", rngs=rngs)
        return Block(width, Attention(width, 2, rngs=rngs), mlp, eps=1e-5, cross=other)

    class Wide(Shift):
        def __init__(self, rngs):
            self.map = Linear(width, width, rngs=rngs)

    def several(make, count):
        return drawn(lambda: stack.init(make, count, rngs=nnx.Rngs(params=0)))

    options = {}
    blocks = several(make, depth)
    if kinds == "mixed":
        stacks = {
            "cross": several(functools.partial(make, cross=True), 4),
            "plain": several(make, 4),
        }
        blocks = stack.Mixed(stacks, ("cross", "plain") * 4)
        options["memory"] = normal(2, 1, 3, width)
    elif kinds != "equal":
        blocks = stack.Inserted(blocks, several(Wide, 4), (1, 3, 5, 7), "between")
        options["context"] = stack.Context(given=jnp.ones(1), repeats=1)
    run = jax.jit(lambda blocks, x: stack.run(blocks, x, **options).x)
    memory = run.lower(blocks, normal(1, 1, 2, width)).compile().memory_analysis()
    # At most what one turn of the loop reads.
    assert memory.temp_size_in_bytes < 2.5 / depth * memory.argument_size_in_bytes
