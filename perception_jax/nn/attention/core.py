"""Softmax attention with one entry point for speed and one for maps.

`attend` computes the output; `probabilities` recomputes softmax rows for taps only. Both use the
same scores, so map mode and fast mode agree. Letters: B batch, T query tokens, K key tokens,
N query heads, M key-value heads (a divisor of N), G query heads a key-value head, H head width,
Q tapped query rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.nn.attention.mask import AnyMask, AttentionMask, dense_mask, take_rows

Bias = Float[Array, "#B #N #T #K"]
"""What is added to the scores, e.g. of relative positions."""

LONG = 128 * 128
"""Scores per head from which attention keeps none of them for the backward pass."""
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
    scores = _masked(_scores(q, k, bias), mask)
    # The division by the row sum comes after the product with the values, where it is cheaper;
    # the shift by the maximum cancels, so no gradient needs to flow through it.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    sums = weights.sum(axis=-1, keepdims=True)
    mixed = _grouped(weights.astype(v.dtype), _heads_first(v), preferred_element_type=jnp.float32)
    return _heads_last((mixed / sums).astype(v.dtype))


def _cudnn(q: Array, k: Array, v: Array, mask: AttentionMask | None) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=mask is not None, implementation="cudnn")


def _cudnn_takes(q: Array, k: Array, v: Array, mask: AnyMask, bias: Bias | None) -> bool:
    """Whether these inputs are for `_cudnn` where the program runs on CUDA."""
    if bias is not None or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    if mask is not None and not (isinstance(mask, AttentionMask) and mask.only_causal):
        return False
    same = q.dtype == k.dtype == v.dtype
    return same and q.shape[3] % 8 == 0 and q.shape[3] <= _CUDNN_WIDTH and _has_cudnn()


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
    mask = structure.unflatten(leaves)

    def plain(heads: tuple, bias: Bias | None, mask: Array | None) -> tuple:
        return (_attend(*heads, mask, bias),), None

    def cudnn(heads: tuple) -> tuple:
        return (_cudnn(*heads, mask),), None

    fused = cudnn if _cudnn_takes(q, k, v, mask, bias) else None
    dense = dense_mask(mask, q.shape[1], k.shape[1])
    ((y,), _) = _per_platform(plain, (q, k, v), bias, dense, cuda=fused)
    return y


def _attend_long_forward(
    *inputs: Any,
) -> tuple[Array, tuple]:
    return _attend_long(*inputs), inputs[:-1]


def _attend_long_backward(
    structure: jax.tree_util.PyTreeDef, kept: tuple, gradient: Array
) -> tuple:
    q, k, v, bias, leaves = kept
    mask = structure.unflatten(leaves)

    def plain(heads: tuple, bias: Bias | None, mask: Array | None) -> tuple:
        *qkv, gradient = heads
        *to_heads, to_bias = jax.vjp(lambda *x: _attend(*x[:3], mask, x[3]), *qkv, bias)[1](
            gradient
        )
        return tuple(to_heads), to_bias

    def cudnn(heads: tuple) -> tuple:
        *qkv, gradient = heads
        return jax.vjp(lambda *qkv: _cudnn(*qkv, mask), *qkv)[1](gradient), None

    fused = cudnn if _cudnn_takes(q, k, v, mask, bias) else None
    dense = dense_mask(mask, q.shape[1], k.shape[1])
    to_heads, to_bias = _per_platform(plain, (q, k, v, gradient), bias, dense, cuda=fused)
    return *to_heads, to_bias, None


_attend_long.defvjp(_attend_long_forward, _attend_long_backward)


def _per_platform(
    function: Callable,
    arrays: tuple[Array, ...],
    bias: Bias | None,
    mask: Bool[Array, "#B #N #T #K"] | None,
    *,
    cuda: Callable | None,
) -> Any:
    """`function(arrays, bias, mask)`; on CPU for the heads of one key after the other.

    The scores then stay in the CPU's cache. Arrays, in and out, are [B, T, heads, H], the second
    of them with key-value heads; next to those out comes the gradient of the bias, or None.
    `cuda(arrays)`, if given, takes the place of `function` on CUDA.
    """
    groups = arrays[1].shape[2]

    def in_turn(arrays: tuple[Array, ...], bias: Bias | None, mask: Array | None) -> Any:
        each = (tuple(_by_group(x, 2, groups) for x in arrays), _by_group(bias, 1, groups))
        shared = mask is not None and mask.shape[1] == 1
        masks = None if shared else _by_group(mask, 1, groups)

        def one(group: tuple) -> Any:
            (heads, bias), own = group
            return function(heads, bias, mask if shared else own)

        out, to_bias = jax.lax.map(one, (each, masks))
        return tuple(_join_groups(x, 2) for x in out), _join_groups(to_bias, 1)

    def at_once(arrays: tuple[Array, ...], bias: Bias | None, mask: Array | None) -> Any:
        return function(arrays, bias, mask)

    def on_cuda(arrays: tuple[Array, ...], bias: Bias | None, mask: Array | None) -> Any:
        return cuda(arrays)

    branches = {"cpu": in_turn} | ({"cuda": on_cuda} if cuda else {})
    return jax.lax.platform_dependent(arrays, bias, mask, default=at_once, **branches)


def _by_group(x: Array | None, axis: int, groups: int) -> Array | None:
    """Heads at `axis` to [groups, ..., heads a group, ...]."""
    if x is None:
        return None
    x = x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join_groups(x: Array | None, axis: int) -> Array | None:
    if x is None:
        return None
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def probabilities(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H"],
    mask: AnyMask = None,
    rows: Int[Array, "*R Q"] | None = None,
    *,
    bias: Bias | None = None,
) -> Float[Array, "B N Q K"]:
    """Float32 attention probabilities of the query `rows` alone; see `attend`."""
    dense = dense_mask(mask, q.shape[1], k.shape[1], rows)
    if rows is not None:
        q = take_rows(q, rows, axis=1)
        bias = None if bias is None else _bias_rows(bias, rows)
    return jax.nn.softmax(_masked(_scores(q, k, bias), dense), axis=-1)


def add_probe(
    y: Float[Array, "B T N H"],
    v: Float[Array, "B K M H"],
    probe: Float[Array, "B N Q K"],
    rows: Int[Array, "*R Q"] | None,
) -> Float[Array, "B T N H"]:
    """Adds `probe @ v` to the tapped rows: d(score)/d(probe) is d(score)/d(probability)."""
    extra = _heads_last(_grouped(probe.astype(v.dtype), _heads_first(v)))
    if rows is None:
        return y + extra
    if rows.ndim == 1:
        return y.at[:, rows].add(extra)
    return jax.vmap(lambda one, index, more: one.at[index].add(more))(y, rows, extra)


def _heads_first(x: Float[Array, "B T N H"]) -> Float[Array, "B N T H"]:
    # Batch axes in front: on CPU, XLA's products over interleaved ones take twice the time.
    return x.transpose(0, 2, 1, 3)


def _heads_last(x: Float[Array, "B N T H"]) -> Float[Array, "B T N H"]:
    return x.transpose(0, 2, 1, 3)


def _scores(
    q: Float[Array, "B T N H"], k: Float[Array, "B K M H"], bias: Bias | None
) -> Float[Array, "B N T K"]:
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    keys = _heads_first(k).swapaxes(2, 3)
    scores = _grouped(_heads_first(scaled), keys, preferred_element_type=jnp.float32)
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
