"""Attention on CPU in blocks whose scores fit the processor's cache.

Letters: B batch, T query tokens, K key tokens, N query heads, M key-value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from perception_jax.ops.sharding import on_mesh

SCORES = 1 << 21
"""Float32 scores in a block, 8 MB: on Zen 4 at least as fast as 4, 6 and 16 MB from 197 to 1,025
tokens."""
FUSED_SCORES = 1 << 16
"""Scores of one head up to which XLA's CPU backend runs softmax and both products as one kernel at
full speed. Query rows are halved where that makes a head so small."""
_FEWEST_EXAMPLES = 2
"""Examples in a block however many scores they have: their copies then run on two cores."""

Mask = Bool[Array, "#B #N #T #K"] | None
"""A dense mask or None."""
Bias = Float[Array, "#B #N #T #K"] | None
"""A bias of the scores or None."""


def in_blocks(
    attend: Callable[..., Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H"],
    v: Float[Array, "B K M H"],
    mask: Mask,
    bias: Bias,
) -> Float[Array, "B T N H"]:
    """`attend` for blocks of examples, key-value heads and query rows, one after the other.

    On a mesh the examples stay together, as each device has its own.

    Args:
      attend: takes the same arguments with heads before tokens ([B, N, T, H]).
    """
    batch, _, heads, _ = q.shape
    rows = _rows(q.shape[1], k.shape[1], mask, bias)
    scores = heads * rows * k.shape[1]
    examples = batch if on_mesh() else _fitting(batch, scores, at_least=_FEWEST_EXAMPLES)

    def some(given: tuple[Array, ...], mask: Mask, bias: Bias) -> Array:
        q, k, v = (x.swapaxes(1, 2) for x in given)
        return _heads_in_turn(attend, q, k, v, mask, bias, rows).swapaxes(1, 2)

    return _mapped(some, (q, k, v), mask, bias, axis=0, parts=batch // examples)


def _heads_in_turn(
    attend: Callable[..., Array],
    q: Float[Array, "B N T H"],
    k: Float[Array, "B M K H"],
    v: Float[Array, "B M K H"],
    mask: Mask,
    bias: Bias,
    rows: int,
) -> Float[Array, "B N T H"]:
    batch, heads, queries, _ = q.shape
    groups, keys = k.shape[1:3]
    scores = batch * (heads // groups) * rows * keys

    def some(given: tuple[Array, ...], mask: Mask, bias: Bias) -> Array:
        q, k, v = given
        if rows == queries:
            return attend(q, k, v, mask, bias)
        filled = jnp.pad(q, ((0, 0), (0, 0), (0, 2 * rows - queries), (0, 0)))
        out = jax.lax.map(lambda half: attend(half, k, v, None, None), _split(filled, 2, 2))
        return _join(out, 2)[:, :, :queries]

    return _mapped(some, (q, k, v), mask, bias, axis=1, parts=groups // _fitting(groups, scores))


def _fitting(count: int, scores: int, at_least: int = 1) -> int:
    """The largest divisor of `count` that fits, or is no more than `at_least`."""
    most = max(SCORES // scores, at_least)
    return max(size for size in range(1, min(count, most) + 1) if count % size == 0)


def _rows(rows: int, keys: int, mask: Mask, bias: Bias) -> int:
    """Query rows of a block: all of them, or half, rounded up."""
    half = -(-rows // 2)
    halve = mask is None and bias is None and half * keys <= FUSED_SCORES < rows * keys
    return half if halve else rows


def in_turn(function: Callable[..., Any], arrays: tuple[Array, ...], mask: Mask, bias: Bias) -> Any:
    """`function(arrays, mask, bias)` for the heads of one key-value head after the other.

    Arrays, in and out, are [B, heads, T, H], the second of them with key-value heads.
    """
    return _mapped(function, arrays, mask, bias, axis=1, parts=arrays[1].shape[1])


def _mapped(
    function: Callable[..., Any],
    arrays: tuple[Array, ...],
    mask: Mask,
    bias: Bias,
    *,
    axis: int,
    parts: int,
) -> Any:
    """`function(arrays, mask, bias)` for parts of one axis in turn; an axis of size 1 is shared."""
    if parts == 1:
        return function(arrays, mask, bias)
    extra = {"mask": mask, "bias": bias}
    own = {name: x for name, x in extra.items() if x is not None and x.shape[axis] > 1}

    def one(part: tuple) -> Any:
        arrays, own = part
        return function(arrays, **(extra | own))

    each = jax.tree.map(lambda x: _split(x, axis, parts), (arrays, own))
    return jax.tree.map(lambda x: _join(x, axis), jax.lax.map(one, each))


def _split(x: Array, axis: int, parts: int) -> Array:
    """An axis to [parts, ..., size of a part, ...]."""
    x = x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x: Array, axis: int) -> Array:
    """Undoes `_split`."""
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
