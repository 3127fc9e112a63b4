"""Attention on TPU by JAX's splash attention, a fused kernel that keeps no scores in memory.

It goes through the keys in blocks with a running float32 softmax, skips blocks that `causal` or
`window` hide, and computes the scores again in its backward pass (Dao et al., arXiv 2205.14135).

Letters: B batch, T query tokens, K key tokens, N query heads, M key-value heads, H head width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from perception_jax.nn.attention.mask import AttentionMask
from perception_jax.ops.sharding import AXES, BATCH_AXES, TENSOR, automatic_axes

PLATFORM = "tpu"
"""Where `attend` runs; tests set "cpu", which interprets the kernel."""
SCORES = 256 * 256
"""Scores of one head from which the kernel is used; compiled for v5e, XLA's attention is as fast at
197 tokens and slower at 257 (docs/scale.md)."""
SCORE_BYTES = 64 << 20
"""Bytes of a chip's float32 scores from which the kernel is used: fewer stay in its fast memory."""
_LANES = 128
"""Tokens are padded to a multiple of a vector register's width."""
_LARGEST_BLOCK = 1024
_HIDDEN = np.iinfo(np.int32).min
"""Segment id of keys that no query may attend to."""


def takes(q: Array, k: Array, v: Array, mask: AttentionMask) -> bool:
    """Whether these inputs are for `attend` where the program runs on a TPU.

    Not with a mask that differs between heads or is given for pairs of tokens, nor with a `start`
    (a cache); nor on a mesh whose axes do not divide the batch and the key-value heads.
    """
    same = q.dtype == k.dtype == v.dtype and q.dtype in (jnp.float32, jnp.bfloat16)
    of_keys = mask.array is None or mask.array.shape[1:3] == (1, 1)
    shards = _shards(k)
    if not same or not of_keys or mask.start is not None or shards is None:
        return False
    scores = q.shape[1] * k.shape[1]
    return scores >= SCORES and 4 * q.shape[0] * q.shape[2] * scores // shards >= SCORE_BYTES


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H"],
    v: Float[Array, "B K M H"],
    mask: AttentionMask,
) -> Float[Array, "B T N H"]:
    """Softmax attention with scale H^-1/2, each chip for its own examples and heads.

    The output of a query without any key is finite and has no meaning.
    """
    batch, keys = k.shape[:2]
    ids = _segment_ids(mask, batch, q.shape[1], keys)
    run = functools.partial(_on_chip, causal=mask.causal, window=mask.window)
    mesh, automatic = automatic_axes(k)
    if not automatic:
        return run(q, k, v, ids)
    over = tuple(axis for axis in BATCH_AXES if axis in automatic) or None
    tokens = PartitionSpec(over, None, TENSOR if TENSOR in automatic else None)
    of_examples = PartitionSpec(None if ids is None or ids[0].shape[0] == 1 else over)
    return jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, of_examples),
        out_specs=tokens,
        axis_names=set(automatic),
        check_vma=False,  # the kernel's outputs do not say over which axes they differ
    )(q, k, v, ids)


def _shards(k: Float[Array, "B K M H"]) -> int | None:
    """Parts into which a mesh of TPUs splits examples and heads; None if not evenly."""
    mesh, free = automatic_axes(k)
    if mesh.abstract_device is not None and mesh.abstract_device.platform != PLATFORM:
        return None
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    automatic = set(free) & set(sizes)
    if AxisType.Explicit in mesh.axis_types or not automatic <= set(AXES):
        return None
    examples = math.prod(sizes[axis] for axis in automatic - {TENSOR})
    heads = sizes[TENSOR] if TENSOR in automatic else 1
    return None if k.shape[0] % examples or k.shape[2] % heads else examples * heads


def _segment_ids(
    mask: AttentionMask, batch: int, queries: int, keys: int
) -> tuple[Int[Array, "#B T"], Int[Array, "#B K"]] | None:
    """Ids of queries and keys, which attend where they are equal; None if all are equal."""
    if mask.array is None and mask.lengths is None and mask.segments is None:
        if mask.causal or _padded(keys)[0] == keys:
            return None  # no query comes after the padding
        return jnp.zeros((1, queries), jnp.int32), jnp.zeros((1, keys), jnp.int32)
    own = jnp.zeros((1, queries), jnp.int32) if mask.segments is None else mask.segments
    other = own if mask.key_segments is None else mask.key_segments
    if mask.segments is None:
        other = jnp.zeros((1, keys), jnp.int32)
    if mask.array is not None:
        other = jnp.where(mask.array[:, 0, 0], other, _HIDDEN)
    if mask.lengths is not None:
        other = jnp.where(jnp.arange(keys) < mask.lengths[:, None], other, _HIDDEN)
    return tuple(jnp.broadcast_to(x, (batch, x.shape[1])).astype(jnp.int32) for x in (own, other))


def _on_chip(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K M H"],
    v: Float[Array, "B K M H"],
    ids: tuple[Int[Array, "#B T"], Int[Array, "#B K"]] | None,
    *,
    causal: bool,
    window: int | None,
) -> Float[Array, "B T N H"]:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    queries, keys = q.shape[1], k.shape[1]
    kernel = _kernel(queries, keys, causal, window, interpret=PLATFORM == "cpu")
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q, k, v = (_pad(x, 1, 0).swapaxes(1, 2) for x in (q, k, v))
    segments, axis = None, None
    if ids is not None:
        own, other = _pad(ids[0], 1, 0), _pad(ids[1], 1, _HIDDEN)
        shared = own.shape[0] == 1
        segments = SegmentIds(own[0], other[0]) if shared else SegmentIds(own, other)
        axis = None if shared else 0
    out = jax.vmap(kernel, in_axes=(0, 0, 0, axis))(q, k, v, segments)
    return out[:, :, :queries].swapaxes(1, 2)


@functools.cache
def _kernel(queries: int, keys: int, causal: bool, window: int | None, *, interpret: bool) -> Any:
    """The kernel of one example, with its schedule of blocks as numpy arrays.

    JAX's own constructors make arrays of the schedule, which belong to the program being traced
    and could not be kept for the next.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask_info,
    )

    (padded_q, block_q), (padded_k, block_k) = _padded(queries), _padded(keys)
    if window is not None:
        reach = (window - 1, 0 if causal else window - 1)
        mask = splash.LocalMask((padded_q, padded_k), reach, offset=0)
    else:
        mask = (splash.CausalMask if causal else splash.FullMask)((padded_q, padded_k))
    heads = splash.MultiHeadMask([mask])  # shared by all heads
    forward, function = splash_attention_mask_info.process_mask(heads, (block_q, block_k))
    backward, _ = splash_attention_mask_info.process_mask_dkv(
        heads, (block_q, block_k), shrink_grid=False
    )
    return splash_attention_kernel.SplashAttentionKernel(
        forward,
        None,
        backward,
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            use_fused_bwd_kernel=True,
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=function,
        interpret=interpret,
    )


def _padded(tokens: int) -> tuple[int, int]:
    """A number of tokens with padding, and the size of its blocks.

    Large blocks read keys and values less often, small ones need less padding.
    """

    def cost(block: int) -> float:
        return -(-tokens // block) * block * (1 + _LANES / (2 * block))

    block = min(range(_LANES, _LARGEST_BLOCK + 1, _LANES), key=cost)
    return -(-tokens // block) * block, block


def _pad(x: Array, axis: int, value: int) -> Array:
    more = [(0, 0)] * x.ndim
    more[axis] = (0, _padded(x.shape[axis])[0] - x.shape[axis])
    return jnp.pad(x, more, constant_values=value)
