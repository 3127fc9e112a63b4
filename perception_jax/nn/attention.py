"""Multi-head attention with one entry point for speed and one for maps.

`attend` computes the output; `probabilities` recomputes softmax rows for taps only. Both use the
same scores, so map mode and fast mode agree. Letters: B batch, T query tokens, K key tokens,
N heads, H head width, Q tapped query rows, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from perception_jax.nn.linear import Linear
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.rope import Rope
from perception_jax.nn.taps import LayerTap
from perception_jax.ops.sharding import constrain

Mask = Bool[Array, "#B #N #T K"]
"""True where a query may look at a key."""

LONG = 128 * 128
"""Scores per head from which attention keeps none of them for the backward pass."""
_CUDNN_WIDTH = 128
"""The widest heads that cuDNN's attention takes on every GPU that has it."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K N H"],
    v: Float[Array, "B K N H"],
    mask: Mask | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention with scale H^-1/2; float32 softmax, output in the dtype of `v`.

    From `LONG` on, the backward pass computes the probabilities again instead of keeping them
    (Dao et al., arXiv 2205.14135, §3.1), so training needs no [B, N, T, K] per layer; such
    attention has reverse-mode derivatives only. In 16 bits and without a mask, CUDA devices run it
    as cuDNN's fused attention, which never writes the scores to memory.
    """
    if q.shape[1] * k.shape[1] < LONG:
        return _attend(q, k, v, mask)
    return _attend_long(q, k, v, mask)


def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K N H"],
    v: Float[Array, "B K N H"],
    mask: Mask | None,
) -> Float[Array, "B T N H"]:
    scores = _masked(_scores(q, k), mask)
    # The division by the row sum comes after the product with the values, where it is cheaper;
    # the shift by the maximum cancels, so no gradient needs to flow through it.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    sums = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.matmul(weights.astype(v.dtype), _heads_first(v), preferred_element_type=jnp.float32)
    return _heads_last((mixed / sums).astype(v.dtype))


def _cudnn(q: Array, k: Array, v: Array, mask: None) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _cudnn_takes(q: Array, k: Array, v: Array, mask: Mask | None) -> bool:
    """Whether these inputs are for `_cudnn` where the program runs on CUDA."""
    if mask is not None or q.dtype not in (jnp.bfloat16, jnp.float16):
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


@jax.custom_vjp
def _attend_long(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K N H"],
    v: Float[Array, "B K N H"],
    mask: Mask | None,
) -> Float[Array, "B T N H"]:
    cudnn = _cudnn if _cudnn_takes(q, k, v, mask) else None
    return _per_platform(_attend, (q, k, v), mask, cuda=cudnn)


def _attend_long_forward(q: Array, k: Array, v: Array, mask: Mask | None) -> tuple[Array, tuple]:
    return _attend_long(q, k, v, mask), (q, k, v, mask)


def _attend_long_backward(kept: tuple, gradient: Array) -> tuple:
    *qkv, mask = kept

    def pull(attention: Callable) -> Callable:
        def pulled(q: Array, k: Array, v: Array, gradient: Array, mask: Mask | None) -> tuple:
            return jax.vjp(lambda *qkv: attention(*qkv, mask), q, k, v)[1](gradient)

        return pulled

    cudnn = pull(_cudnn) if _cudnn_takes(*qkv, mask) else None
    return *_per_platform(pull(_attend), (*qkv, gradient), mask, cuda=cudnn), None


_attend_long.defvjp(_attend_long_forward, _attend_long_backward)


def _per_platform(
    function: Callable, arrays: tuple[Array, ...], mask: Mask | None, *, cuda: Callable | None
) -> Any:
    """`function(*arrays, mask)`, on CPU for one head after the other: scores stay in its cache.

    Arrays are [B, T, N, H] in and out. `cuda`, if given, takes the place of `function` there.
    """

    def in_turn(arrays: tuple[Array, ...], mask: Mask | None) -> Any:
        count = arrays[0].shape[2]
        if mask is not None:
            mask = jnp.broadcast_to(mask, (mask.shape[0], count, *mask.shape[2:]))
            mask = jnp.moveaxis(mask[:, :, None], 1, 0)
        heads = tuple(jnp.moveaxis(x[:, :, :, None], 2, 0) for x in arrays)
        out = jax.lax.map(lambda head: function(*head[0], head[1]), (heads, mask))
        return jax.tree.map(lambda x: jnp.moveaxis(x[:, :, :, 0], 0, 2), out)

    def at_once(function: Callable) -> Callable:
        return lambda arrays, mask: function(*arrays, mask)

    branches = {"cpu": in_turn} | ({"cuda": at_once(cuda)} if cuda else {})
    return jax.lax.platform_dependent(arrays, mask, default=at_once(function), **branches)


def probabilities(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K N H"],
    mask: Mask | None = None,
    rows: Int[Array, "*R Q"] | None = None,
) -> Float[Array, "B N Q K"]:
    """Float32 attention probabilities of the query `rows` alone."""
    if rows is not None:
        q = take_rows(q, rows, axis=1)
        mask = None if mask is None else _mask_rows(mask, rows)
    return jax.nn.softmax(_masked(_scores(q, k), mask), axis=-1)


def take_rows(x: Array, rows: Int[Array, "*R Q"], axis: int) -> Array:
    """Rows of `x` along `axis`; `rows` is shared by the batch ([Q]) or per example ([B, Q])."""
    if rows.ndim == 1:
        return jnp.take(x, rows, axis=axis)
    return jax.vmap(lambda one, index: jnp.take(one, index, axis=axis - 1))(x, rows)


class Attention(nnx.Module):
    """Self-attention with separate q, k, v and output projections.

    Args:
      key_bias: whether keys have a bias (EVA's have none).
      inner_eps: of a norm over the joined heads before the output projection (EVA-02's sub-LN);
        None has no such norm.
      gain: of the initial output projection; see `stack.residual_gain`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key_bias: bool = True,
        inner_eps: float | None = None,
        gain: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, bias=key_bias, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.inner_norm = None if inner_eps is None else LayerNorm(width, eps=inner_eps)
        self.out_proj = Linear(width, width, gain=gain, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask | None = None,
        rope: Rope | None = None,
        tap: LayerTap | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N Q T"] | None]:
        """The output and, if tapped, the probabilities of the tapped rows (float32)."""
        q, k, v = (self._split(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if rope is not None:
            q, k = rope.turn(q), rope.turn(k)
        y = attend(q, k, v, mask)
        recorded = None
        if tap is not None:
            recorded = probabilities(q, k, mask, tap.rows)
            if tap.probe is not None:
                y = _add_probe(y, v, tap)
        y = constrain(y, "batch", None, "tensor").reshape(x.shape)
        return self.out_proj(y if self.inner_norm is None else self.inner_norm(y)), recorded

    def _split(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
        x = x.reshape(*x.shape[:2], self.heads, x.shape[2] // self.heads)
        return constrain(x, "batch", None, "tensor")


def _heads_first(x: Float[Array, "B T N H"]) -> Float[Array, "B N T H"]:
    # Batch axes in front: on CPU, XLA's products over interleaved ones take twice the time.
    return x.transpose(0, 2, 1, 3)


def _heads_last(x: Float[Array, "B N T H"]) -> Float[Array, "B T N H"]:
    return x.transpose(0, 2, 1, 3)


def _scores(q: Float[Array, "B T N H"], k: Float[Array, "B K N H"]) -> Float[Array, "B N T K"]:
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    keys = _heads_first(k).swapaxes(2, 3)
    return jnp.matmul(_heads_first(scaled), keys, preferred_element_type=jnp.float32)


def _masked(scores: Float[Array, "B N T K"], mask: Mask | None) -> Float[Array, "B N T K"]:
    # The lowest finite number, not -inf: a row without any key then averages instead of being NaN.
    return scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


def _mask_rows(mask: Mask, rows: Int[Array, "*R Q"]) -> Bool[Array, "#B #N #Q K"]:
    if mask.shape[2] == 1:
        return mask
    if rows.ndim == 2 and mask.shape[0] == 1:
        mask = jnp.broadcast_to(mask, (rows.shape[0], *mask.shape[1:]))
    return take_rows(mask, rows, axis=2)


def _add_probe(
    y: Float[Array, "B T N H"], v: Float[Array, "B K N H"], tap: LayerTap
) -> Float[Array, "B T N H"]:
    """Adds `probe @ v` to the tapped rows: d(score)/d(probe) is d(score)/d(probability)."""
    extra = _heads_last(tap.probe.astype(v.dtype) @ _heads_first(v))
    if tap.rows is None:
        return y + extra
    if tap.rows.ndim == 1:
        return y.at[:, tap.rows].add(extra)
    return jax.vmap(lambda one, index, more: one.at[index].add(more))(y, tap.rows, extra)
