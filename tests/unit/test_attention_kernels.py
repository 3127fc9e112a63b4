"""Fused attention kernels: TPU's interpreted on CPU against a dense softmax, cuDNN's as lowered."""

from __future__ import annotations

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from perception_jax.nn.attention import AttentionMask, attend, core, probabilities, splash
from perception_jax.shard import flops, program
from perception_jax.shard.mesh import make_mesh
from tests.arrays import normal

B, T, N, M, H = 2, 261, 4, 2, 8
"""261 tokens are padded to three blocks of 128."""


def coins(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).random(shape) < 0.7)


SEGMENTS = jnp.asarray(np.repeat([[0, 3, 3], [5, 1, 2]], 87, axis=1))
LENGTHS = jnp.array([140, 0])
LEFT_PADDED = jnp.asarray(np.arange(T) >= np.array([[9], [200]]))[:, None, None]
MASKS = {
    "none": None,
    "causal": AttentionMask(causal=True),
    "window": AttentionMask(window=40),
    "causal window": AttentionMask(causal=True, window=130),
    "segments": AttentionMask(segments=SEGMENTS, causal=True),
    "lengths": AttentionMask(lengths=LENGTHS),
    "causal lengths": AttentionMask(lengths=LENGTHS, causal=True),
    "keys": AttentionMask(array=coins(7, B, 1, 1, T)),
    "left padding": AttentionMask(array=LEFT_PADDED, causal=True),
    "an array of keys": coins(8, 1, 1, 1, T),
    "segments of other keys": AttentionMask(
        segments=SEGMENTS, key_segments=SEGMENTS[::-1], lengths=jnp.array([250, 240])
    ),
}


@pytest.fixture
def interpreted(monkeypatch):
    """The TPU's kernel on CPU, in several blocks, for every number of tokens."""
    monkeypatch.setattr(splash, "PLATFORM", "cpu")
    monkeypatch.setattr(splash, "SCORES", 0)
    monkeypatch.setattr(splash, "SCORE_BYTES", 0)
    monkeypatch.setattr(splash, "_LARGEST_BLOCK", 128)


def dense(q, k, v, mask):
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bknh->bntk", q, k) * q.shape[-1] ** -0.5
    if isinstance(mask, AttentionMask):
        mask = mask.dense(q.shape[1], k.shape[1])
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    return jnp.einsum("bntk,bknh->btnh", jax.nn.softmax(scores, axis=-1), v)


def arrays(kv_heads=M, width=H, dtype=jnp.float32, keys=T):
    shapes = ((B, T, N, width), (B, keys, kv_heads, width), (B, keys, kv_heads, width))
    return [normal(seed, *shape).astype(dtype) for seed, shape in enumerate((*shapes, shapes[0]))]


def slopes(function, q, k, v, readout):
    def score(q, k, v):
        out = function(q, k, v).astype(jnp.float32)
        return jnp.sum(out * readout.astype(jnp.float32)), out

    return jax.jit(jax.grad(score, argnums=(0, 1, 2), has_aux=True))(q, k, v)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_tpu_kernel_and_its_gradients_equal_a_dense_softmax(mask, interpreted):
    given = arrays()
    found = slopes(lambda *qkv: attend(*qkv, mask), *given)
    assert len(core._kernels(*given[:3], core.as_conditions(mask), None)) == 1
    chex.assert_trees_all_close(found, slopes(lambda *qkv: dense(*qkv, mask), *given), atol=1e-5)


@pytest.mark.parametrize(
    ("kv_heads", "width", "dtype", "keys"),
    [
        (N, 72, jnp.float32, T),
        (1, 80, jnp.float32, T),
        (M, 64, jnp.float32, 77),
        (M, 128, jnp.bfloat16, T),
    ],
)
def test_heads_widths_dtypes_and_other_keys(kv_heads, width, dtype, keys, interpreted):
    given = arrays(kv_heads, width, dtype, keys)
    mask = AttentionMask(causal=True) if keys == T else None
    wide = [x.astype(jnp.float32) for x in given]
    found = slopes(lambda *qkv: attend(*qkv, mask), *given)
    found = jax.tree.map(lambda x: x.astype(jnp.float32), found)
    atol = 1e-5 if dtype == jnp.float32 else 2e-2
    expected = slopes(lambda *qkv: dense(*qkv, mask), *wide)
    chex.assert_trees_all_close(found, expected, atol=atol, rtol=atol)


def test_rows_of_probabilities_agree_with_the_tpu_kernel(interpreted):
    q, k, v, _ = arrays(kv_heads=N)
    mask = MASKS["causal lengths"]

    @jax.jit
    def both(q, k, v):
        rows = jnp.array([0, 130, 260])
        weights = probabilities(q, k, mask, rows)
        return jnp.einsum("bnqk,bknh->bqnh", weights, v), attend(q, k, v, mask)[:, rows]

    chex.assert_trees_all_close(*both(q, k, v), atol=1e-5)


def text_for(platform, dtype, mask, tokens=256, heads=256 // B, bias=None):
    """The program of an attention and its gradient on a platform that need not be here."""
    shape = jax.ShapeDtypeStruct((B, tokens, heads, 64), dtype)

    def score(q, k, v):
        return attend(q, k, v, mask, bias=bias).sum().astype(jnp.float32)

    traced = jax.jit(jax.value_and_grad(score, argnums=(0, 1, 2))).trace(shape, shape, shape)
    return traced.lower(lowering_platforms=(platform,)).as_text()


IDS = jnp.zeros((B, 256), jnp.int32)
BY_TYPE = {
    "none": (None, True),
    "causal": (AttentionMask(causal=True), True),
    "lengths": (AttentionMask(lengths=jnp.array([3, 9])), True),
    "segments": (AttentionMask(segments=IDS), True),
    "keys": (coins(1, B, 1, 1, 256), True),
    "pairs": (coins(1, B, 1, 256, 256), False),
    "heads": (coins(1, 1, 256 // B, 1, 256), False),
    "cache": (AttentionMask(causal=True, start=jnp.array([0, 0])), False),
}


@pytest.mark.parametrize(("mask", "taken"), BY_TYPE.values(), ids=BY_TYPE)
def test_a_mask_that_the_tpu_kernel_does_not_have_is_xlas(mask, taken):
    text = text_for("tpu", jnp.bfloat16, mask)
    assert text.count("@tpu_custom_call") == (3 if taken else 0)  # twice forward, once backward
    assert "tpu_custom_call" not in text_for("cpu", jnp.bfloat16, mask)


def test_the_tpu_kernel_is_for_long_inputs_without_bias():
    assert "tpu_custom_call" not in text_for("tpu", jnp.bfloat16, None, tokens=128, heads=512)
    assert "tpu_custom_call" not in text_for("tpu", jnp.bfloat16, None, heads=64)
    assert "tpu_custom_call" not in text_for("tpu", jnp.float16, None)
    bias = jnp.zeros((1, 1, 256, 256))
    assert "tpu_custom_call" not in text_for("tpu", jnp.float32, None, bias=bias)


@pytest.mark.parametrize(("kv_heads", "current"), [(N, True), (1, True), (N, False)])
def test_on_a_mesh_each_device_runs_the_tpu_kernel_on_its_own(kv_heads, current, interpreted):
    """Examples over two axes and heads over another; heads that do not divide are XLA's. Without
    a current mesh it is the one on which the arrays lie."""
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    given = arrays(kv_heads)
    mask = MASKS["causal lengths"]
    split = NamedSharding(mesh, PartitionSpec(("replica", "fsdp"), None, "tensor"))
    placements = [split if x.shape[2] > 1 else None for x in given]
    given = [
        x if s is None else jax.device_put(x, s) for x, s in zip(given, placements, strict=True)
    ]

    def score(q, k, v, readout):
        return jnp.sum(attend(q, k, v, mask) * readout)

    with jax.set_mesh(mesh) if current else contextlib.nullcontext():
        taken = core._kernels(*given[:3], mask, None)
        assert list(taken) == (["cpu"] if kv_heads == N else [])
        compiled = jax.jit(jax.grad(score, argnums=(0, 1, 2))).lower(*given).compile()
        found = compiled(*given)
    if kv_heads == N:
        assert not program.collectives(compiled)
    expected = slopes(lambda *qkv: dense(*qkv, mask), *map(np.asarray, given))[0]
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_flops_are_those_of_a_dense_attention_on_every_platform(causal):
    """A causal mask counts as none, as for the models' FLOPs per second."""
    tokens, heads = 577, 32
    shape = jax.ShapeDtypeStruct((B, tokens, heads, 64), jnp.float32)
    mask = AttentionMask(causal=causal)
    closed = 4 * B * heads * tokens**2 * 64

    def score(qkv):
        return attend(*qkv, mask).sum()

    text = str(jax.make_jaxpr(score)([shape] * 3))
    assert "pallas_call" in text
    assert flops.count_flops(score, [shape] * 3) == closed
    assert flops.gradient_flops(score, [shape] * 3) == 3 * closed


@pytest.mark.parametrize(
    ("mask", "calls"),
    [
        (None, ("fmhaSoftmax", "NO_MASK")),
        (AttentionMask(causal=True), ("fmhaSoftmax", "CAUSAL")),
        (AttentionMask(lengths=jnp.array([3, 0])), ("fmhaSoftmax", "PADDING")),
        (AttentionMask(lengths=jnp.array([3]), causal=True), ("fmhaSoftmax", "PADDING_CAUSAL")),
        (AttentionMask(segments=IDS, causal=True), ("fmhaScaleBiasSoftmax", "CAUSAL")),
        (coins(1, B, 1, 1, 256), ("fmhaScaleBiasSoftmax", "NO_MASK")),
        (coins(1, 1, 256 // B, 1, 256), None),
    ],
)
def test_cudnn_is_called_with_masks_on_cuda(mask, calls, monkeypatch):
    """As lowered: nothing here runs, which takes a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(core, "_has_cudnn", lambda: True)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    text = text_for("cuda", jnp.bfloat16, mask)
    if calls is None:
        assert "__cudnn$" not in text
        return
    name, kind = calls
    assert text.count(f"@__cudnn${name}(") == 2  # for the output, and for its gradient once more
    assert text.count(f"@__cudnn${name}Backward(") == 1
    assert f"\\22mask_type\\22: \\22{kind}\\22" in text
