"""Softmax attention with one entry point for speed and one for attention maps.

`attend` computes the output; `probabilities` recomputes softmax rows for taps only. Both use the
same scores, so map mode and fast mode agree. Letters: B batch, T query tokens, K key tokens,
N query heads, M key-value heads (a divisor of N), G query heads a key-value head, H head width,
Q tapped query rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.nn.attention import blocks, splash
from perception_jax.nn.attention.mask import (
    AnyMask,
    AttentionMask,
    as_conditions,
    dense_mask,
    take_rows,
)
from perception_jax.ops.sharding import constrain

Bias = Float[Array, "#B #N #T #K"]
"""An additive bias of the scores, e.g. of relative positions."""

LONG = 128 * 128
"""Number of scores per head from which attention recomputes them in the backward pass."""
_CUDNN_WIDTH = 128
"""The widest heads that cuDNN's attention takes on every GPU that has it."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H"],
    v: Float[Array, "B K M H"],
    mask: AnyMask = None,
    *,
    bias: Bias | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with scale H^-1/2; float32 softmax, output in the dtype of `v`.

    From `LONG` on, the backward pass computes the probabilities again instead of keeping them
    (Dao et al., arXiv 2205.14135, §3.1), so training needs no [B, N, T, K] per layer; such
    attention has reverse-mode derivatives only. In 16 bits and without a mask or with a plain
    causal one, CUDA devices run it as cuDNN's fused attention, which never writes the scores to
    memory.

    Args:
      k, v: with N heads, or with M < N: query heads [0, N/M) share the first of them, and so on
        (grouped-query attention, arXiv 2305.13245).
      mask: which keys a query may attend to.
      bias: added to the scores before the mask.

    Raises:
      ConfigError: N is no multiple of M, or a mask that does not fit.
    """
    if q.shape[2] % k.shape[2]:
        raise ConfigError(
            f"attention: expected a number of query heads that is a multiple of the "
            f"{k.shape[2]} key-value heads, found {q.shape[2]}."
        )
    if q.shape[1] * k.shape[1] < LONG:
        return _attend(q, k, v, dense_mask(mask, q.shape[1], k.shape[1]), bias)
    if bias is not None and bias.shape[1] == 1:  # whose gradient is then summed over heads here
        bias = jnp.broadcast_to(bias, (bias.shape[0], q.shape[2], *bias.shape[2:]))
    # Flattened: inside, JAX fills masks with placeholders that are no arrays.
    return _attend_long(q, k, v, bias, *jax.tree.flatten(mask))


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H"],
    v: Float[Array, "B K M H"],
    mask: Bool[Array, "#B #N #T #K"] | None,
    bias: Bias | None,
) -> Float[Array, "B T N H"]:
    # Batch axes in front: on CPU, XLA's products over interleaved ones take twice the time.
    return _attend_heads_first(*(x.swapaxes(1, 2) for x in (q, k, v)), mask, bias).swapaxes(1, 2)


def _attend_heads_first(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B M K H"],
    v: Float[Array, "B M K H"],
    mask: Bool[Array, "#B #N #T #K"] | None,
    bias: Bias | None,
) -> Float[Array, "B N T H"]:
    scores = _masked(_scores(q, k, bias), mask)
    # The division by the row sum comes after the product with the values, where it is cheaper;
    # the shift by the maximum cancels, so no gradient needs to flow through it.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    sums = weights.sum(axis=-1, keepdims=True)
    mixed = _grouped(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / sums).astype(v.dtype)


def _kernels(
    q: Array, k: Array, v: Array, mask: AttentionMask, bias: Bias | None
) -> dict[str, Callable[..., Array]]:
    """The fused kernels that take these inputs, by platform."""
    found = {}
    if bias is None and _cudnn_takes(q, k, v, mask):
        found["cuda"] = _cudnn
    if bias is None and splash.takes(q, k, v, mask):
        found[splash.PLATFORM] = splash.attend
    return found


def _fused(
    kernel: Callable[..., Array], q: Array, k: Array, v: Array, mask: AttentionMask
) -> Float[Array, "B T N H"]:
    """What a kernel gives for queries with a key; others average all values, as in `_attend`."""
    out = kernel(q, k, v, mask)
    seen = mask.seen(q.shape[1], k.shape[1])
    if seen is None:
        return out
    mean = v.mean(axis=1, keepdims=True, dtype=jnp.float32).astype(v.dtype)
    mean = mean.repeat(q.shape[2] // k.shape[2], axis=2)
    return jnp.where(seen.swapaxes(1, 2)[..., None], out, mean)


def _cudnn(q: Array, k: Array, v: Array, mask: AttentionMask) -> Array:
    options: dict[str, Any] = {"is_causal": mask.causal}
    if _needs_bias(mask):
        dense = dataclasses.replace(mask, causal=False).dense(q.shape[1], k.shape[1])
        shape = (*dense.shape[:2], q.shape[1], k.shape[1])
        options["mask"] = constrain(jnp.broadcast_to(dense, shape), "batch")
    elif mask.lengths is not None:
        lengths = jnp.maximum(mask.lengths, 1)  # for none the kernel would divide by 0
        options["key_value_seq_lengths"] = jnp.broadcast_to(lengths, k.shape[:1]).astype(jnp.int32)
    return jax.nn.dot_product_attention(q, k, v, **options, implementation="cudnn")


def _cudnn_takes(q: Array, k: Array, v: Array, mask: AttentionMask) -> bool:
    """Whether these inputs are for `_cudnn` where the program runs on CUDA.

    Not with a mask that differs between heads, which would be as large as the scores, nor with a
    `start` (a cache).
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        return False
    if mask.start is not None or (mask.array is not None and mask.array.shape[1] > 1):
        return False
    if _needs_bias(mask) and (q.shape[1] % 2 or k.shape[1] % 2):
        return False  # cuDNN's backward pass takes a bias of even lengths only
    return q.shape[3] % 8 == 0 and q.shape[3] <= _CUDNN_WIDTH and _has_cudnn()


def _needs_bias(mask: AttentionMask) -> bool:
    """Whether cuDNN has a mask as a bias of the scores alone: not lengths, not a causal one."""
    return mask.array is not None or mask.segments is not None or mask.window is not None


@functools.cache
def _has_cudnn() -> bool:
    """Whether this process has a CUDA device that cuDNN's attention is made for (Ampere on)."""
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return False
    return int(device.compute_capability.split(".")[0]) >= 8


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend_long(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H"],
    v: Float[Array, "B K M H"],
    bias: Bias | None,
    leaves: list[Array | int],
    structure: jax.tree_util.PyTreeDef,
) -> Float[Array, "B T N H"]:
    return _attend_long_on(q, k, v, bias, leaves, structure, trained=False)


def _attend_long_on(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H"],
    v: Float[Array, "B K M H"],
    bias: Bias | None,
    leaves: list[Array | int],
    structure: jax.tree_util.PyTreeDef,
    *,
    trained: bool,
) -> Float[Array, "B T N H"]:
    mask = as_conditions(structure.unflatten(leaves))

    def fused(kernel: Callable, q: Array, k: Array, v: Array, *_: Array | None) -> Array:
        run = functools.partial(_fused, kernel, mask=mask)
        return jax.vjp(run, q, k, v)[0] if trained else run(q, k, v)

    branches = {"cpu": functools.partial(blocks.in_blocks, _attend_heads_first)}
    for platform, kernel in _kernels(q, k, v, mask, bias).items():
        branches[platform] = functools.partial(fused, kernel)
    dense = mask.dense(q.shape[1], k.shape[1])
    return jax.lax.platform_dependent(q, k, v, dense, bias, default=_attend, **branches)


def _attend_long_forward(
    q: Array, k: Array, v: Array, bias: Bias | None, leaves: list, structure: Any
) -> tuple[Array, tuple]:
    # By the form of a kernel that its gradient runs: under rematerialisation both forward passes
    # are then next to each other, and XLA runs one of them.
    out = _attend_long_on(q, k, v, bias, leaves, structure, trained=True)
    return out, (q, k, v, bias, leaves)


def _attend_long_backward(
    structure: jax.tree_util.PyTreeDef, kept: tuple, gradient: Array
) -> tuple:
    q, k, v, bias, leaves = kept
    mask = as_conditions(structure.unflatten(leaves))

    def one(arrays: tuple, mask: Array | None, bias: Bias | None) -> tuple:
        *qkv, gradient = arrays

        def run(q: Array, k: Array, v: Array, bias: Bias | None) -> Array:
            return _attend_heads_first(q, k, v, mask, bias)

        *to_heads, to_bias = jax.vjp(run, *qkv, bias)[1](gradient)
        return tuple(to_heads), to_bias

    def heads_first(function: Callable, arrays: tuple, *others: Array | None) -> tuple:
        to_heads, to_bias = function(tuple(x.swapaxes(1, 2) for x in arrays), *others)
        return tuple(x.swapaxes(1, 2) for x in to_heads), to_bias

    def fused(kernel: Callable, arrays: tuple, *_: Array | None) -> tuple:
        *qkv, gradient = arrays
        return jax.vjp(lambda *qkv: _fused(kernel, *qkv, mask), *qkv)[1](gradient), None

    at_once = functools.partial(heads_first, one)
    branches = {"cpu": functools.partial(heads_first, functools.partial(blocks.in_turn, one))}
    for platform, kernel in _kernels(q, k, v, mask, bias).items():
        branches[platform] = functools.partial(fused, kernel)
    dense = mask.dense(q.shape[1], k.shape[1])
    to_heads, to_bias = jax.lax.platform_dependent(
        (q, k, v, gradient), dense, bias, default=at_once, **branches
    )
    return *to_heads, to_bias, None


_attend_long.defvjp(_attend_long_forward, _attend_long_backward)


def probabilities(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H"],
    mask: AnyMask = None,
    rows: Int[Array, "*R Q"] | None = None,
    *,
    bias: Bias | None = None,
) -> Float[Array, "B N Q K"]:
    """Computes float32 attention probabilities of the query `rows` only; see `attend`."""
    dense = dense_mask(mask, q.shape[1], k.shape[1], rows)
    if rows is not None:
        q = take_rows(q, rows, axis=1)
        bias = None if bias is None else _bias_rows(bias, rows)
    scores = _scores(q.swapaxes(1, 2), k.swapaxes(1, 2), bias)
    return jax.nn.softmax(_masked(scores, dense), axis=-1)


def add_probe(
    y: Float[Array, "B T N H"],
    v: Float[Array, "B K M H"],
    probe: Float[Array, "B N Q K"],
    rows: Int[Array, "*R Q"] | None,
) -> Float[Array, "B T N H"]:
    """Adds `probe @ v` to the tapped rows: d(score)/d(probe) is d(score)/d(probability)."""
    extra = _grouped(probe.astype(v.dtype), v.swapaxes(1, 2)).swapaxes(1, 2)
    if rows is None:
        return y + extra
    if rows.ndim == 1:
        return y.at[:, rows].add(extra)
    return jax.vmap(lambda one, index, more: one.at[index].add(more))(y, rows, extra)


def _scores(
    q: Float[Array, "B N T H"], k: Float[Array, "B M K H"], bias: Bias | None
) -> Float[Array, "B N T K"]:
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    scores = _grouped(scaled, k.swapaxes(2, 3), preferred_element_type=jnp.float32)
    return scores if bias is None else scores + bias.astype(scores.dtype)


def _grouped(
    a: Float[Array, "B N T I"], b: Float[Array, "B M I O"], **options: Any
) -> Float[Array, "B N T O"]:
    """`a @ b` where N/M heads of `a` in turn share one of `b`, which is not repeated."""
    batch, heads, rows, inner = a.shape
    grouped = a.reshape(batch, b.shape[1], -1, inner)
    return jnp.matmul(grouped, b, **options).reshape(batch, heads, rows, b.shape[3])


def _masked(
    scores: Float[Array, "B N T K"], mask: Bool[Array, "#B #N #T #K"] | None
) -> Float[Array, "B N T K"]:
    # The lowest finite number, not -inf: a row without any key then averages instead of being NaN.
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


def _bias_rows(bias: Bias, rows: Int[Array, "*R Q"]) -> Float[Array, "#B #N #Q #K"]:
    if bias.shape[2] == 1:
        return bias
    if rows.ndim == 2 and bias.shape[0] == 1:
        bias = jnp.broadcast_to(bias, (rows.shape[0], *bias.shape[1:]))
    return take_rows(bias, rows, axis=2)
