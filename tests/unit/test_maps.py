"""Maps of every image tower against whole attention matrices computed layer by layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.models.clip.config import VisionConfig
from perception_jax.models.clip.modeling import ClipVisionTower
from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.models.eva.config import EvaVisionConfig
from perception_jax.models.eva.modeling import EvaVisionTower
from perception_jax.models.siglip.config import SiglipVisionConfig
from perception_jax.models.siglip.modeling import SiglipVisionTower
from perception_jax.nn import maps, stack
from perception_jax.nn.taps import Taps
from perception_jax.nn.text_tower import TextConfig, TextTower
from perception_jax.ops.losses import unit
from tests.arrays import drawn, normal

WIDTH, HEADS, DEPTH, EMBED, BATCH = 32, 4, 2, 32, 2
SIZES = {"patch_size": 8, "width": WIDTH, "depth": DEPTH, "heads": HEADS, "mlp_dim": 48}
GRID = (3, 5)  # other than the trained 4 x 4, so positions are resized too
REGISTERS = 3
TOWERS = ("clip", "siglip", "eva01", "eva02_post_norm", "eva02_rope", "dinov2", "registers")
PREFIX = {"siglip": 0, "registers": 1 + REGISTERS}
CLASS_TOWERS = tuple(name for name in TOWERS if name != "siglip")


@functools.cache
def tower_of(name):
    return drawn(lambda: make_tower(name, nnx.Rngs(params=0)), 7)


def make_tower(name, rngs):
    if name == "clip":
        return ClipVisionTower(VisionConfig(image_size=32, **SIZES), EMBED, rngs=rngs)
    if name == "siglip":
        return SiglipVisionTower(SiglipVisionConfig(image_size=32, **SIZES), rngs=rngs)
    if name == "dinov2":
        return Dinov2(Dinov2Config(image_size=32, **SIZES), rngs=rngs)
    if name == "registers":
        config = Dinov2Config(
            image_size=32, registers=REGISTERS, mlp="swiglu", layer_scale=0.5, **SIZES
        )
        return Dinov2(config, rngs=rngs)
    return EvaVisionTower(EvaVisionConfig(kind=name, image_size=32, **SIZES), EMBED, rngs=rngs)


@pytest.fixture(scope="module")
def pixels():
    return normal(0, BATCH, 8 * GRID[0], 8 * GRID[1], 3)


@pytest.fixture(scope="module")
def texts():
    return normal(1, 3, EMBED)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Dense:
    """Whole attention matrices of the layers [L B N T T], of the pooling head, and the result."""

    attention: Any
    pool: Any
    embedding: Any


def softmax(q, k, extra):
    """Attention [B N Q K]; heads are split here, scores and exponentials written out."""
    q, k = (split(y) for y in (q, k))
    scores = jnp.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(WIDTH // HEADS)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return weights, weights + extra


def split(y):
    return y.reshape(*y.shape[:2], HEADS, WIDTH // HEADS)


def mix(weights, v):
    return jnp.einsum("bnqk,bknh->bqnh", weights, split(v)).reshape(BATCH, -1, WIDTH)


def dense(tower, start, extra=0.0, pool_extra=0.0):
    """From the input of the first block on; the extras are added to the attention."""
    x, recorded = start, []
    rope = tower.rope(GRID) if hasattr(tower, "rope") else None
    extra = jnp.broadcast_to(extra, np.broadcast_shapes(np.shape(extra), (DEPTH, 1, 1, 1, 1)))
    for layer in range(DEPTH):
        block = stack.part(tower.blocks, layer, layer + 1)
        block = jax.tree.map(lambda leaf: leaf[0], block)
        part, pre = block.attention, block.norm == "pre"
        y = block.norm1(x) if pre else x
        q, k, v = part.q_proj(y), part.k_proj(y), part.v_proj(y)
        if rope is not None:
            q, k = (rope.rotate(split(z)).reshape(z.shape) for z in (q, k))
        weights, used = softmax(q, k, extra[layer])
        recorded.append(weights)
        y = mix(used, v)
        y = part.out_proj(y if part.inner_norm is None else part.inner_norm(y))
        y = y if pre else block.norm1(y)
        x = block.mlp_step(x + (y if block.scale1 is None else y * block.scale1[...])).x
    x = tower.norm_post(x)
    pool = None
    if hasattr(tower, "head"):
        head = tower.head
        query = jnp.broadcast_to(head.q_proj(head.probe[...])[None, None], (BATCH, 1, WIDTH))
        pool, used = softmax(query, head.k_proj(x), pool_extra)
        y = head.out_proj(mix(used, head.v_proj(x)))[:, 0]
        embedding, pool = y + head.mlp(head.norm(y)), pool[:, :, 0]
    else:
        embedding = x[:, 0]
    if hasattr(tower, "projection"):
        embedding = tower.projection(embedding)
    return Dense(jnp.stack(recorded), pool, embedding)


text_maps = jax.jit(maps.text_maps)


def cosine(embedding, text):
    return jnp.sum(unit(embedding) * unit(text))


@dataclasses.dataclass
class Reference:
    """`Dense`, and each text's gradient for the attention [texts L B N T T] or the head's row."""

    plain: Dense
    gradients: np.ndarray


@functools.cache
def reference_of(name):
    tower = tower_of(name)
    pixels, texts = normal(0, BATCH, 8 * GRID[0], 8 * GRID[1], 3), normal(1, 3, EMBED)
    pooled = name == "siglip"
    tokens = PREFIX.get(name, 1) + GRID[0] * GRID[1]
    zeros = jnp.zeros((1 if pooled else DEPTH, BATCH, HEADS, 1 if pooled else tokens, tokens))

    @jax.jit
    def differentiate(tower, pixels):
        start = tower(pixels, taps=Taps(hidden=(0,))).hidden[0]

        def embed(extra):
            found = dense(tower, start, *((0.0, extra[0]) if pooled else (extra,)))
            return found.embedding, found

        embedding, pull, plain = jax.vjp(embed, zeros, has_aux=True)
        along = jnp.stack([jax.grad(cosine)(embedding, text[None]) for text in texts])
        return plain, jax.vmap(pull)(along)[0]

    return Reference(*jax.device_get(differentiate(tower, pixels)))


@pytest.mark.parametrize("name", TOWERS)
def test_map_mode_equals_dense_softmax_and_fast_mode(name, pixels):
    tower, plain = tower_of(name), reference_of(name).plain
    rows = np.array([0, 7])
    taps = Taps(attention=(0, -1), rows=jnp.asarray(rows), pool=name == "siglip")
    fast = jax.jit(lambda t, p: t(p))(tower, pixels)
    out = jax.jit(lambda t, p, taps: t(p, taps=taps, remat=True))(tower, pixels, taps)
    wanted = plain.attention[[0, DEPTH - 1]][:, :, :, rows]
    chex.assert_trees_all_close(out.attention, wanted, atol=1e-5)
    chex.assert_trees_all_close(out.pool_attention, plain.pool, atol=1e-5)
    chex.assert_trees_all_close(fast.embedding, plain.embedding, atol=1e-5)
    chex.assert_trees_all_close(
        (out.embedding, out.tokens), (fast.embedding, fast.tokens), atol=1e-6
    )
    assert (out.grid, out.prefix) == (fast.grid, fast.prefix) == (GRID, PREFIX.get(name, 1))
    assert out.patches.shape == (BATCH, GRID[0] * GRID[1], WIDTH)


@pytest.mark.parametrize("name", ["eva02_post_norm", "eva02_rope", "registers"])
def test_probe_gradients_under_remat_equal_those_of_dense_attention(name, pixels, texts):
    tower, rows = tower_of(name), np.array([5, 0])
    taps = Taps(attention=(0, -1), rows=jnp.asarray(rows))

    @jax.jit
    def gradient(tower, probes):
        def score(probes):
            out = tower(pixels, taps=taps.with_probes(probes), remat=True)
            return cosine(out.embedding, texts[:1])

        return jax.grad(score)(probes)

    wanted = reference_of(name).gradients[0][[0, DEPTH - 1]][:, :, :, rows]
    probes = taps.zeros(depth=DEPTH, batch=BATCH, heads=HEADS, keys=wanted.shape[-1])
    chex.assert_trees_all_close(gradient(tower, probes), wanted, atol=1e-5)
    assert np.abs(wanted[0, :, :, 0]).max() > 1e-3  # a patch's row counts in layer 0
    assert np.abs(wanted[1, :, :, 0]).max() == 0  # and not in the last, which is read at 0


@pytest.mark.parametrize("name", TOWERS)
def test_maps_equal_their_definition_on_dense_attention(name, pixels, texts):
    tower, prefix = tower_of(name), PREFIX.get(name, 1)
    plain, gradients = reference_of(name).plain, reference_of(name).gradients
    row = plain.attention[-1][:, :, 0] if plain.pool is None else plain.pool

    def on_grid(values):
        return values[..., prefix:].mean(axis=-2).reshape(*values.shape[:-2], *GRID)

    found = text_maps(tower, pixels, texts)
    relevance = on_grid(np.maximum(gradients[:, -1, :, :, 0] * row, 0))
    chex.assert_trees_all_close(found.output.embedding, plain.embedding, atol=1e-5)
    chex.assert_trees_all_close(found.attention, on_grid(row), atol=1e-5)
    chex.assert_trees_all_close(found.relevance, relevance, atol=1e-5)
    assert float(relevance.max(axis=(1, 2, 3)).min()) > 1e-4


@pytest.mark.parametrize("name", ["siglip", "registers"])
def test_one_map_at_a_time_is_the_same(name, pixels, texts):
    tower = tower_of(name)

    @jax.jit
    def alone(tower, pixels, texts):
        mixed = texts[jnp.array([2, 0])]  # one text an image
        attention = maps.class_attention(tower, pixels)
        relevance = maps.text_relevance(tower, pixels, mixed)
        return attention, relevance, maps.pixel_gradient(tower, pixels, mixed)

    together = text_maps(tower, pixels, texts)
    relevance, gradient = (
        np.asarray(found)[[2, 0], [0, 1]] for found in (together.relevance, together.gradient)
    )
    wanted = (together.attention, relevance, gradient)
    chex.assert_trees_all_close(alone(tower, pixels, texts), wanted, atol=1e-6)
    assert float(gradient.min(axis=(1, 2)).max()) > 0
    nothing = text_maps(tower, pixels, np.asarray(texts)[:0])
    assert nothing.relevance.shape == (0, BATCH, *GRID)
    chex.assert_trees_all_close(nothing.attention, together.attention, atol=1e-6)


def test_several_texts_for_one_image_are_not_added_up(pixels, texts, unchecked):
    """Each pair has its own map; counts that make no pairs are refused."""
    tower = tower_of("clip")
    pixels, texts = np.asarray(pixels), np.asarray(texts)
    together = text_maps(tower, pixels[:1], texts)
    alone = jax.jit(lambda *a: (maps.text_relevance(*a), maps.pixel_gradient(*a)))
    wanted = (np.asarray(together.relevance)[:, 0], np.asarray(together.gradient)[:, 0])
    chex.assert_trees_all_close(alone(tower, pixels[:1], texts), wanted, atol=1e-6)
    assert np.abs(wanted[0][0] - wanted[0][1]).max() > 1e-4
    one = jax.eval_shape(alone, tower, pixels, texts[:1])
    assert [found.shape[0] for found in one] == [BATCH, BATCH]
    for function in (maps.text_relevance, maps.pixel_gradient):
        for words in (texts, texts[:0]):
            with pytest.raises(ConfigError, match="one text for each of 2 images"):
                jax.eval_shape(function, tower, pixels, words)
    for function in (maps.text_relevance, maps.pixel_gradient, maps.text_maps):
        with pytest.raises(ConfigError, match=r"embeddings of texts, .* found an array \[\d+\]"):
            jax.eval_shape(function, tower, pixels[:1], texts[0])
        with pytest.raises(ConfigError, match="another model"):
            jax.eval_shape(function, tower, pixels[:1], texts[:, :5])


def test_an_earlier_layer_can_be_shown(pixels):
    tower, plain = tower_of("registers"), reference_of("registers").plain
    wanted = plain.attention[0, :, :, 0, 1 + REGISTERS :].mean(axis=1).reshape(BATCH, *GRID)
    for layer in (0, -DEPTH):
        found = jax.jit(functools.partial(maps.class_attention, layer=layer))(tower, pixels)
        chex.assert_trees_all_close(found, wanted, atol=1e-5)


def test_what_a_tower_does_not_have_is_an_error(pixels, unchecked):
    raw = np.zeros(np.shape(pixels), np.uint8)
    for wrong in (raw, np.asarray(pixels)[0], np.moveaxis(np.asarray(pixels), 3, 1)):
        with pytest.raises(ConfigError, match="expected normalised images, floating-point"):
            jax.eval_shape(lambda tower, x: tower(x), tower_of("clip"), wrong)
    with pytest.raises(ConfigError, match=r"layer 1: this tower has no class token.*give -1"):
        maps.class_attention(tower_of("siglip"), pixels, layer=1)
    for name in CLASS_TOWERS:
        with pytest.raises(ConfigError, match="read at its class token"):
            tower_of(name)(pixels, taps=Taps(pool=True))
    with pytest.raises(ConfigError, match="layer 2, but the stack has 2"):
        maps.class_attention(tower_of("clip"), pixels, layer=2)


@pytest.mark.parametrize("name", ["clip", "siglip", "registers"])
def test_memory_of_maps_grows_with_rows_not_with_the_square_of_tokens(name):
    """By the compiled programs' own figures, for 4096 patches."""
    tower, side = tower_of(name), 64
    whole = 4 * HEADS * side**4  # bytes of one layer's attention

    def needed(function):
        pixels = jax.ShapeDtypeStruct((1, 8 * side, 8 * side, 3), jnp.float32)
        memory = jax.jit(function).lower(tower, pixels).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    def attention(tower, pixels):
        return maps.class_attention(tower, pixels), tower(pixels).embedding

    def relevance(tower, pixels):
        return maps.text_relevance(tower, pixels, jnp.ones((1, EMBED)))

    def every_row(tower, pixels):
        return tower(pixels, taps=Taps(attention=(-1,))).attention

    plain = needed(lambda tower, pixels: tower(pixels).embedding)
    assert needed(attention) - plain < whole / 25  # one head alone is a quarter
    assert needed(relevance) - plain < whole / 25
    assert needed(every_row) > whole


def planted(batch, rows, columns, width):
    """Tokens along three axes of falling strength, with a little noise."""
    rng = np.random.default_rng(width)
    axes = np.linalg.qr(rng.normal(size=(width, 3)))[0].T
    weights = rng.normal(size=(batch * rows * columns, 3)) * [4, 2, 1]
    tokens = weights @ axes + 0.01 * rng.normal(size=(len(weights), width)) + 3
    return tokens.reshape(batch, rows * columns, width).astype(np.float32)


def test_a_text_tower_has_no_pooling_head_to_tap():
    config = TextConfig(vocab_size=8, context=4, width=8, depth=1, heads=1, mlp_dim=8)
    tower = drawn(lambda: TextTower(config, 4, rngs=nnx.Rngs(params=0)))
    with pytest.raises(ConfigError, match="pooling head"):
        tower(jnp.ones((1, 4), jnp.int32), taps=Taps(pool=True))


def by_svd(tokens):
    """Three components that vary, each scaled from its 2nd to its 98th percentile."""
    centred = tokens - tokens.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    signs = np.sign([axis[np.argmax(np.abs(axis))] for axis in axes])
    found = centred @ axes.T * signs
    low, high = np.percentile(found, [2, 98], axis=0)
    return np.clip((found - low) / (high - low), 0.0, 1.0)


patch_pca = jax.jit(maps.patch_pca, static_argnums=1)


def pca_bytes(tokens, grid):
    """One image's components as a picture has them."""
    found = patch_pca(np.asarray(tokens, np.float32)[None], grid)[0]
    return np.round(np.asarray(found) * 255).astype(np.uint8)


def test_patch_pca_finds_planted_components_and_ignores_sign_and_rotation():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    weights = rng.normal(size=(60, 8)) * [9, 5, 2, 0.01, 0.01, 0.01, 0.01, 0.01]
    tokens = weights @ basis.T + 3.0
    picture = pca_bytes(tokens, (6, 10)).reshape(60, 3)
    for k in range(3):
        found = np.corrcoef(picture[:, k], weights[:, k])[0, 1]
        assert abs(found) > 0.98
    assert picture.min() == 0
    assert picture.max() == 255
    again = pca_bytes(np.concatenate([tokens, tokens]), (12, 10))
    assert (again[:6] == again[6:]).all()
    order = rng.permutation(60)
    moved = pca_bytes(tokens[order], (6, 10)).reshape(60, 3)
    assert np.abs(moved.astype(int) - picture[order]).max() <= 1


def test_patch_pca_leaves_components_that_do_not_vary_grey():
    picture = pca_bytes(np.outer(np.arange(6.0), [1.0, 0, 0, 0]), (2, 3))
    assert (picture[..., 1:] == 128).all()
    assert picture[0, 0, 0] == 0
    assert picture[1, 2, 0] == 255
    assert (pca_bytes(np.ones((6, 4)), (2, 3)) == 128).all()


@pytest.mark.parametrize("width", [12, 80], ids=["many patches", "wide tokens"])
def test_patch_pca_equals_the_svd_over_the_whole_batch(width):
    tokens = planted(2, 4, 6, width)
    found = jax.jit(lambda t: maps.patch_pca(t, (4, 6)))(tokens)
    wanted = by_svd(np.asarray(tokens, np.float64).reshape(48, width)).reshape(2, 4, 6, 3)
    chex.assert_trees_all_close(np.asarray(found), wanted.astype(np.float32), atol=0.6 / 255)
    one = jax.jit(lambda t: maps.patch_pca(t[:1], (4, 6)))(tokens)
    assert np.abs(np.asarray(one) - np.asarray(found)[:1]).max() > 0.05  # its own basis and range


def test_patch_pca_of_patches_that_do_not_vary_is_grey():
    rng = np.random.default_rng(0)
    line = (np.outer(rng.normal(size=12), rng.normal(size=8)) + 1).astype(np.float32)[None]
    found = np.asarray(patch_pca(line, (3, 4)))
    assert found[..., 0].max() == 1
    assert (found[..., 1:] == 0.5).all()
    assert (np.asarray(patch_pca(jnp.ones((1, 2, 8)), (1, 2))) == 0.5).all()
    with pytest.raises(ConfigError, match="expected 3 x 4 = 12 patches an image, found 13"):
        maps.patch_pca(jnp.ones((1, 13, 8)), (3, 4))
