"""GiVE's network: written-out numbers, and what adapters may and may not change."""

from __future__ import annotations

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.interop.binding import source_shapes
from perception_jax.interop.load import load_params
from perception_jax.interop.rules import RuleTable
from perception_jax.models.clip.config import ClipConfig, TextConfig, VisionConfig
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.clip.params import hf_table
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn.adapters import AdapterParam
from perception_jax.nn.mlp import gelu
from perception_jax.nn.taps import Taps
from perception_jax.nn.text_tower import text_mask
from perception_jax.systems.give.adapter import AdapterConfig, AgAdapter, InstructionFeatures
from perception_jax.systems.give.checkpoint import adapter_rules, names_of
from perception_jax.systems.give.losses import RowLabels, oid, oiic, oitc
from perception_jax.systems.give.model import (
    Give,
    GiveConfig,
    instruct,
    leaves_in_give,
)

START, END = 18, 19
CONFIG = ClipConfig(
    vision=VisionConfig(image_size=8, patch_size=4, width=16, depth=2, heads=2, mlp_dim=32),
    text=TextConfig(vocab_size=20, context=8, width=12, depth=2, heads=2, mlp_dim=24),
    embed_dim=10,
)
DEEP = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, depth=4))
IDS = jnp.array([[START, 5, 6, END, END, END, END, END], [START, 7, END, END, END, END, END, END]])


def fill(shape, a, b, p):
    """Made-up numbers that anyone can write down again, float64."""
    k = np.arange(math.prod(shape), dtype=np.float64)
    return (a * np.sin(b * k + 0.01 * k**2 + p)).reshape(shape)


def numbers(text):
    return np.array(text.split(), np.float64)


def assert_close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.float64(found), expected, rtol=0, atol=tolerance)


def clip(config=DEEP):
    return Clip(config, rngs=nnx.Rngs(params=1))


def make_give(layers, config=DEEP, **adapter):
    adapter = AdapterConfig(**{"heads": 2, **adapter})
    return Give(GiveConfig(layers=layers, adapter=adapter), clip(config), rngs=nnx.Rngs(params=2))


call = jax.jit(Give.__call__, static_argnames="repeats")
read = jax.jit(instruct, static_argnames="strength")


# --- Written-out numbers ------------------------------------------------------------------------

ADAPTER_NAMES = (
    *("norm.weight", "norm.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight"),
    *("mlp.fc2.bias", "to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight", "to_out.bias"),
)


def adapter_weights(shapes, prefix, phase):
    """Under the names of a checkpoint, kernels [out, in]."""
    found = {}
    for j, name in enumerate(ADAPTER_NAMES):
        value = fill(shapes[f"{prefix}.{name}"], 0.3, 0.7, j + phase)
        found[f"{prefix}.{name}"] = np.float32(value + (name == "norm.weight"))
    return found


def filled_adapter():
    config = AdapterConfig(heads=2)
    fresh = nnx.eval_shape(lambda: AgAdapter(config, 8, 6, rngs=nnx.Rngs(params=0)))
    names = RuleTable(rules=adapter_rules("ag_adapters.0", "a", config))
    leaves = {f"a/{path}": leaf for path, leaf in flatten(fresh).items()}
    shapes = source_shapes(names, {path: leaf.shape for path, leaf in leaves.items()})
    params = load_params(names, adapter_weights(shapes, "ag_adapters.0", 0), leaves).params
    return unflatten(fresh, {path[2:]: leaf for path, leaf in params.items()})


def told(states, mask, strength=1.0, embedding=None):
    states = jnp.asarray(states, jnp.float32)
    return InstructionFeatures(
        states=states,
        mask=jnp.asarray(mask, bool),
        embedding=jnp.zeros((len(states), 1)) if embedding is None else embedding,
        strength=jnp.float32(strength),
    )


H = fill((2, 5, 8), 1, 0.37, 0.1)
STATES = fill((2, 4, 6), 1, 0.53, 0.2)
MASK = [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_the_adapter_by_numbers():
    adapter, h = filled_adapter(), jnp.asarray(H, jnp.float32)
    out = np.float64(adapter(h, told(STATES, MASK)))
    assert_close(out.sum(), 5.757124)
    assert_close(abs(out).sum(), 53.968211)
    assert_close(np.float64(adapter(h, told(STATES, MASK, 0.25))).sum(), 3.391155)
    first = "-0.098286 0.178564 0.708699 0.711367 1.260757 1.137183 0.755116 0.180204"
    last = "-0.266310 -1.254637 0.515085 0.359945 -0.634709 0.272814 1.287294 -0.393303"
    assert_close(out[0, 0], numbers(first))
    assert_close(out[1, 4], numbers(last))
    assert_close((out - H).sum(axis=(1, 2)), [1.549438, 1.605188])
    attention = adapter.attention(h, told(STATES, MASK))
    assert_close(attention[0, 0, 0], numbers("0.203731 0.187090 0.304582 0.304597"))
    assert_close(attention[1, 1, 4], numbers("0.520684 0.479316 0 0"))


def test_the_losses_by_numbers():
    def rows(vectors):
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def given(image=(10, 11, 11, 10, 12, 12)):
        ints = (image, (0, 0, 0, 1, 1, 2), range(6))
        return RowLabels(
            **{
                name: jnp.array(list(values), jnp.int32)
                for name, values in zip(("image", "label", "caption"), ints, strict=True)
            }
        )

    v = rows(fill((6, 4), 1, 0.9, 0.3))
    t = rows(v + 0.6 * fill((6, 4), 1, 1.3, 0.8))
    absent = rows(fill((6, 4), 1, 1.7, 0.5))
    v, t, absent = (jnp.asarray(x, jnp.float32) for x in (v, t, absent))
    assert_close(oitc(v, t, jnp.float32(5), given()), 0.796418)
    assert_close(oitc(v, t, jnp.float32(5), given(range(6))), 0.796544)
    assert_close(oiic(v, given(), temperature=0.1), 9.298297)
    assert_close(oiic(v, given(), absent, temperature=0.1), 11.150578)
    d, d_absent = fill((6,), 2, 1, 0.2) + 0.5, fill((6,), 2, 1, 1.2) - 0.5
    assert_close(oid(jnp.asarray(d, jnp.float32), jnp.asarray(d_absent, jnp.float32)), 0.688055)


@pytest.fixture(scope="module")
def filled():
    """The tiny CLIP with two adapters, every parameter by its place in the list of names."""
    plain, give = nnx.eval_shape(lambda: (clip(CONFIG), make_give((0, 1), config=CONFIG)))
    leaves = flatten(plain)
    shapes = source_shapes(hf_table(), {path: leaf.shape for path, leaf in leaves.items()})
    assert len(shapes) == 78
    theirs = {}
    for j, name in enumerate(sorted(shapes)):
        value = fill(shapes[name], 0.4, 0.7, 0.1 * j)
        theirs[name] = np.float32(value + ("norm" in name and name.endswith("weight")))
    theirs["logit_scale"] = np.array(2.0, np.float32)
    backbone = unflatten(plain, load_params(hf_table(), theirs, leaves).params)

    leaves = flatten(give, AdapterParam)
    names = names_of(give).table()
    shapes = source_shapes(names, {path: leaf.shape for path, leaf in leaves.items()})
    theirs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    for block in range(2):
        theirs |= adapter_weights(shapes, f"ag_adapters.{block}", 20 * block)
    own = load_params(names, theirs, leaves).params
    return unflatten(give, leaves_in_give(backbone) | own)


PIXELS = jnp.asarray(fill((2, 3, 8, 8), 1, 0.11, 0.4).transpose(0, 2, 3, 1), jnp.float32)


def test_a_steered_clip_by_numbers(filled):
    named = read(filled.backbone.text, IDS)
    e = """-0.079955 0.290659 0.386348 -0.225257 0.069842
           -0.299071 -0.482000 0.535621 0.305304 -0.048725"""
    assert_close(named.embedding[0], numbers(e))
    static, steered = call(filled, PIXELS), call(filled, PIXELS, named)
    v = """0.375384 0.371158 0.104785 -0.227976 -0.110879
           0.406313 0.555107 -0.022989 -0.101674 0.402469"""
    assert_close(static.embedding[0], numbers(v))
    v = """0.174499 0.287343 0.332289 -0.320945 -0.227500
           0.355986 0.626301 0.062177 0.109757 0.294812"""
    assert_close(steered.embedding[0], numbers(v))
    v = """0.207212 0.191916 0.457613 -0.321018 -0.447107
           0.310702 0.489192 0.035416 0.135408 0.228976"""
    assert_close(steered.embedding[1], numbers(v))
    for out, expected in ((static, 335.803591), (steered, 358.343024)):
        total = np.abs(np.float64(out.tower.tokens)).sum()
        assert_close(total / expected, 1.0, 1e-6)  # 160 float32 numbers
    swapped = call(filled, PIXELS, jax.tree.map(lambda x: x[::-1] if x.ndim else x, named))
    assert_close((steered.embedding * swapped.embedding).sum(axis=1), [0.997257, 0.996477])


# --- Where adapters go, and how many parameters they have ---------------------------------------


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (4, (0, 1, 2, 3)),
        (12, tuple(range(12))),
        (24, tuple(range(1, 24, 2))),
        (27, (1, 3, 5, 8, 10, 12, 14, 17, 19, 21, 23, 26)),
        (40, (2, 5, 9, 12, 15, 19, 22, 25, 29, 32, 35, 39)),
    ],
)
def test_twelve_adapters_spread_evenly_and_the_last_block_has_one(depth, expected):
    assert GiveConfig().placed(depth) == expected
    gaps = np.diff([-1, *expected])
    assert expected[-1] == depth - 1
    assert gaps.max() - gaps.min() <= 1


def test_places_by_name_and_number():
    for name, expected in (
        ("all", (0, 1, 2, 3, 4)),
        ("first half", (0, 1)),
        ("last half", (2, 3, 4)),
        ((1, 4), (1, 4)),
    ):
        assert GiveConfig(layers=name).placed(5) == expected
    for layers in ((), (3, 1), (1, 1), (-1, 2), (2, 5)):
        with pytest.raises(ConfigError, match=r"ascending numbers of blocks in \[0, 4\]"):
            GiveConfig(layers=layers).placed(5)
    with pytest.raises(ConfigError, match="one of spread, all, first half, last half, found 'mid'"):
        GiveConfig(layers="mid").placed(5)
    with pytest.raises(ConfigError, match="divisor of the image width 16, found 3"):
        AgAdapter(AdapterConfig(heads=3), 16, 12, rngs=nnx.Rngs(params=0))
    with pytest.raises(ConfigError, match="divisor of the image width 16, found 0"):
        AgAdapter(AdapterConfig(), 16, 12, rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize(
    ("config", "each", "head"),
    [
        (ClipConfig.vit_b16(), 3_346_176, 984_577),
        (ClipConfig.vit_b32(), 3_346_176, 984_577),
        (ClipConfig.vit_l14(), 6_034_432, 1_837_057),
        (ClipConfig.vit_l14_336(), 6_034_432, 1_837_057),
    ],
    ids=["B/16", "B/32", "L/14", "L/14 336"],
)
def test_parameter_counts(config, each, head):
    def make():
        return Give(GiveConfig(), Clip(config, rngs=nnx.Rngs(params=0)), rngs=nnx.Rngs(params=0))

    give = nnx.eval_shape(make)
    sizes = {path: leaf.size for path, leaf in flatten(give, AdapterParam).items()}
    in_head = sum(size for path, size in sizes.items() if path.startswith("oid_head/"))
    assert (in_head, sum(sizes.values()) - in_head) == (head, 12 * each)
    assert give.backbone.vision.blocks.inserts.heads == config.vision.heads  # 64 wide
    plain = nnx.eval_shape(lambda: Clip(config, rngs=nnx.Rngs(params=0)))
    assert len(flatten(give)) == len(flatten(plain)) + len(sizes)


# --- What adapters change -----------------------------------------------------------------------


@functools.cache
def backbone_leaves():
    """Random ones, without compiling a fresh model's random numbers."""
    rng = np.random.default_rng(0)
    found = {}
    for path, leaf in flatten(nnx.eval_shape(clip)).items():
        scale = (leaf.shape[-2] if leaf.ndim > 1 else 4) ** -0.5
        value = path.endswith("/scale") + scale * rng.normal(size=leaf.shape)
        found[path] = jnp.asarray(value, jnp.float32)
    return found


@functools.cache
def fresh_give(layers="all", **adapter):
    """Adapters as they start, in a random backbone."""
    own = jax.jit(lambda: flatten(make_give(layers, **adapter), AdapterParam))()
    backbone = unflatten(nnx.eval_shape(clip), backbone_leaves())
    abstract = nnx.eval_shape(lambda: make_give(layers, **adapter))
    return unflatten(abstract, leaves_in_give(backbone) | own)


@functools.cache
def random_give(layers):
    """Adapters that do something."""
    rng = np.random.default_rng(1)
    abstract = nnx.eval_shape(lambda: make_give(layers))
    own = {
        path: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in flatten(abstract, AdapterParam).items()
    }
    backbone = unflatten(nnx.eval_shape(clip), backbone_leaves())
    return unflatten(abstract, leaves_in_give(backbone) | own)


@pytest.mark.parametrize("gate", ["none", "tanh"])
def test_fresh_adapters_change_nothing(gate):
    give = fresh_give(gate=gate)
    plain = unflatten(nnx.eval_shape(clip), backbone_leaves())
    expected = jax.jit(lambda tower, pixels: tower(pixels))(plain.vision, PIXELS)
    steered = call(give, PIXELS, read(give.backbone.text, IDS))
    chex.assert_trees_all_close(steered.tower, expected, atol=1e-6)
    assert bool(jnp.any(steered.presence_logit != 0))
    # Without an instruction, bit for bit: also adapters that do something are left out.
    for model in (give, random_give("all")):
        static = call(model, PIXELS)
        chex.assert_trees_all_equal(static.tower, expected)
        assert static.presence_logit is None


def test_strength_zero_is_the_backbone_and_its_logit_stays():
    give = random_give("all")
    named = read(give.backbone.text, IDS, strength=0.0)
    static, steered = call(give, PIXELS), call(give, PIXELS, named)
    chex.assert_trees_all_equal(steered.tower, static.tower)
    expected = give.oid_head(static.tower.pooled, named.embedding)
    chex.assert_trees_all_close(steered.presence_logit, expected, atol=1e-6)


def test_what_an_adapter_adds_is_linear_in_the_strength():
    adapter, h = filled_adapter(), jnp.asarray(H, jnp.float32)
    whole = adapter(h, told(STATES, MASK)) - h
    for strength in (0.0, 0.25, 1.5, -1.0):
        added = adapter(h, told(STATES, MASK, strength)) - h
        chex.assert_trees_all_close(added, strength * whole, atol=1e-6)
    # In a whole tower it moves the embedding further.
    give = random_give("all")
    named = read(give.backbone.text, IDS)
    moves = [
        call(give, PIXELS, dataclasses.replace(named, strength=jnp.float32(s))).embedding
        for s in (0.0, 0.1, 0.2)
    ]
    near, far = (jnp.linalg.norm(move - moves[0], axis=1) for move in moves[1:])
    assert bool((near > 1e-4).all() & (far > near).all())


def test_the_gate_opens_like_a_tanh():
    adapter = AgAdapter(AdapterConfig(heads=2, gate="tanh"), 8, 6, rngs=nnx.Rngs(params=3))
    assert float(jnp.abs(adapter.to_out.kernel[...]).max()) > 0.1  # not zero, as without a gate
    h = jnp.asarray(H, jnp.float32)

    def added(gate):
        adapter.gate[...] = jnp.float32(gate)
        return adapter(h, told(STATES, MASK)) - h

    assert float(jnp.abs(added(0.0)).max()) == 0
    chex.assert_trees_all_close(added(-2.0), -added(2.0), atol=1e-6)
    ratio = math.tanh(2.0) / math.tanh(0.5)
    chex.assert_trees_all_close(added(2.0), ratio * added(0.5), atol=1e-5)


def test_a_linear_connector_is_one_layer():
    adapter = AgAdapter(AdapterConfig(heads=2, connector="linear"), 8, 6, rngs=nnx.Rngs(params=3))
    assert adapter.fc2 is None
    out = adapter.to_out
    out.kernel[...] = jax.random.normal(jax.random.key(0), out.kernel.shape)
    h = jnp.asarray(H, jnp.float32)
    two = filled_adapter()
    expected = _by_hand(adapter, h, adapter.fc1(jnp.asarray(STATES, jnp.float32)))
    chex.assert_trees_all_close(adapter(h, told(STATES, MASK)), expected, atol=1e-5)
    text = two.fc2(gelu(two.fc1(jnp.asarray(STATES, jnp.float32))))
    expected = _by_hand(two, h, text)
    chex.assert_trees_all_close(two(h, told(STATES, MASK)), expected, atol=1e-5)


def _by_hand(adapter, h, text):
    """Head by head, row by row; padding is left out, not masked."""
    rows = adapter.to_q(adapter.norm(h)), adapter.to_k(text), adapter.to_v(text)
    q, k, v = map(np.float64, rows)
    mixed = np.zeros(h.shape)
    for b, n, head in np.ndindex(2, 5, 2):
        part, seen = slice(4 * head, 4 * head + 4), np.array(MASK[b], bool)
        scores = k[b, seen, part] @ q[b, n, part] / 2
        weights = np.exp(scores) / np.exp(scores).sum()
        mixed[b, n, part] = weights @ v[b, seen, part]
    return np.float64(h) + np.float64(adapter.to_out(jnp.asarray(mixed, jnp.float32)))


def test_fresh_adapters_can_learn():
    """The zero projection has a gradient at once; behind it the rest follows a step later."""
    give = fresh_give()
    graph, trained, frozen = nnx.split(give, nnx.Param, ...)
    named = read(give.backbone.text, IDS)

    def score(trained):
        return jnp.sum(nnx.merge(graph, trained, frozen)(PIXELS, named).embedding[:, :3])

    gradient = jax.jit(jax.grad(score))(trained)
    inserts = gradient["backbone"]["vision"]["blocks"]["inserts"]
    per_layer = jnp.abs(inserts["to_out"]["kernel"][...]).max(axis=(1, 2))
    assert float(per_layer.min()) > 1e-6
    assert float(jnp.abs(inserts["to_v"]["kernel"][...]).max()) == 0


# --- Padding ------------------------------------------------------------------------------------


def test_padding_changes_nothing():
    give = random_give((1, 3))
    short = [[START, 5, 6, END], [START, 7, END]]

    # Compiled as users do: tokens reach 10, where a step of float32 is 9.5e-7.
    run = jax.jit(
        lambda give, ids: give(PIXELS, read(give.backbone.text, ids)),
        compiler_options={"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True},
    )

    def steered(pad, length):
        ids = [row + [pad] * (length - len(row)) for row in short]
        return run(give, jnp.array(ids))

    expected = steered(END, 4)
    assert float(jnp.abs(expected.embedding[0] - expected.embedding[1]).max()) > 1e-2
    for length in (4, 8):
        zeros, ends = (steered(pad, length) for pad in (0, END))
        chex.assert_trees_all_equal(zeros, ends)
        chex.assert_trees_all_close(zeros, expected, atol=1e-6)


def test_masks_end_with_the_first_end_token():
    clip = jnp.array([[18, 5, 19, 19], [18, 19, 1, 0], [18, 1, 5, 19]])
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(text_mask(clip, "end"), np.array(expected, bool))
    siglip = jnp.array([[7, 5, 1, 1], [1, 1, 1, 1], [7, 30, 1, 9], [7, 5, 9, 8]])
    expected = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(text_mask(siglip, "last"), np.array(expected, bool))


# --- Several instructions an image --------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "remat"), [("all", False), ((2, 3), True), ((1,), False)], ids=str
)
def test_sharing_what_comes_before_is_the_plain_way(layers, remat):
    give = random_give(layers)
    graph, state = nnx.split(give)
    ids = jnp.concatenate([IDS, IDS[::-1, :]])
    named = read(give.backbone.text, ids)
    readout = jax.random.normal(jax.random.key(7), (4, CONFIG.embed_dim))

    def seen(state, pixels, states, share):
        pixels, repeats = (pixels, 2) if share else (jnp.repeat(pixels, 2, axis=0), 1)
        given = dataclasses.replace(named, states=states)
        out = nnx.merge(graph, state)(pixels, given, repeats=repeats, remat=remat)
        return jnp.sum(out.embedding * readout) + jnp.sum(out.presence_logit), out

    slopes = jax.jit(jax.grad(seen, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    found, expected = (slopes(state, PIXELS, named.states, share) for share in (True, False))
    assert found[1].embedding.shape == (4, CONFIG.embed_dim)
    chex.assert_trees_all_close(found, expected, atol=1e-5)
    assert float(jnp.abs(found[0][2]).max()) > 1e-4


def test_taps_before_the_batch_grows_are_refused():
    give = random_give((1, 3))
    named = read(give.backbone.text, jnp.concatenate([IDS, IDS]))
    for taps in (Taps(hidden=(0,)), Taps(hidden=(1,)), Taps(attention=(0,)), Taps(attention=(1,))):
        with pytest.raises(ConfigError, match="record the batch before it grows"):
            give(PIXELS, named, repeats=2, taps=taps)
    taps = Taps(hidden=(2, -1), attention=(2, 3), inserts=(1, 3))
    shared = call(give, PIXELS, named, repeats=2, taps=taps)
    plain = call(give, jnp.repeat(PIXELS, 2, axis=0), named, taps=taps)
    chex.assert_trees_all_close(shared, plain, atol=1e-6)
    with pytest.raises(ConfigError, match=r"inserts of layers \[2\]; this call uses .* \[1, 3\]"):
        give(PIXELS, named, repeats=2, taps=Taps(inserts=(2,)))
