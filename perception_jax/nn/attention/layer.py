"""Attention between projected tokens, and the layer with its projections.

Letters: B batch, T query tokens, K key tokens, D width, C width of the keys' tokens, N query heads,
M key-value heads, H head width, Q tapped query rows.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.errors import ConfigError
from perception_jax.nn.attention import core
from perception_jax.nn.attention.cache import LayerCache
from perception_jax.nn.attention.core import Bias
from perception_jax.nn.attention.mask import AnyMask, as_conditions
from perception_jax.nn.dropout import keys_of
from perception_jax.nn.linear import Linear
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.rope import Rope
from perception_jax.nn.taps import LayerTap
from perception_jax.ops.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOutput:
    """Output of an attention layer.

    Attributes:
      x: the heads' outputs, joined or projected.
      rows: probabilities of the tapped rows, float32; None if not tapped.
      cache: the layer's cache with the new keys and values; None without one.
    """

    x: Float[Array, "B T D"]
    rows: Float[Array, "B N Q K"] | None = None
    cache: LayerCache | None = None


def multi_head(
    q: Float[Array, "#B T NH"],
    k: Float[Array, "B K MH"],
    v: Float[Array, "B K MH"],
    *,
    heads: int,
    kv_heads: int | None = None,
    mask: AnyMask = None,
    bias: Bias | None = None,
    rope: Rope | None = None,
    tap: LayerTap | None = None,
    cache: LayerCache | None = None,
) -> AttentionOutput:
    """Attention between projected tokens whose heads are joined, before the output projection.

    Args:
      q: queries of each example, or of one that all share (learned queries).
      heads, kv_heads: of queries, and of keys and values (None: as many).
      mask, bias: see `attend`; with a cache that is not fresh they are over its whole capacity,
        and `start` and `lengths` of an `AttentionMask` are the cache's unless they are given.
      rope: turns queries and keys, which are then the same tokens.
      tap: what to record.
      cache: holds the keys and values so far; `k` and `v` are put behind them. The output of a
        token that does not fit is NaN.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    q, k, v = (_split(x, n) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if rope is not None:
        q, k = rope.rotate(q), rope.rotate(k)
    if q.shape[0] != k.shape[0]:
        q = q.repeat(k.shape[0], axis=0)
    new = k.shape[1]
    if cache is not None:
        cache = cache.write(k, v)
        if not cache.stack.fresh:
            mask = as_conditions(mask).cached(cache.lengths, new)
            k, v = (x.astype(q.dtype) for x in cache.read())
    y = core.attend(q, k, v, mask, bias=bias)
    recorded = None
    if tap is not None:
        recorded = core.probabilities(q, k, mask, tap.rows, bias=bias)
        if tap.probe is not None:
            y = core.add_probe(y, v, tap.probe, tap.rows)
    if cache is not None and not cache.stack.fresh:
        y = jnp.where(cache.overflows(new)[:, :, None, None], jnp.nan, y)
    y = constrain(y, "batch", None, "tensor").reshape(*y.shape[:2], -1)
    return AttentionOutput(x=y, rows=recorded, cache=cache)


class Attention(nnx.Module):
    """Attention with separate q, k, v and output projections: of a sequence, or to another one.

    Args:
      width: of queries and output.
      heads: of the queries.
      head_width: None is `width / heads`.
      kv_heads: of keys and values; None is `heads`.
      keys_width: of the tokens from which keys and values come; None is `width`.
      bias: whether queries and values have a bias.
      key_bias, out_bias: of keys (EVA's have none) and output; None is `bias`.
      inner_eps: of a norm over the joined heads before the output projection (EVA-02's sub-LN);
        None has no such norm.
      gain: of the initial output projection; see `stack.residual_gain`.

    Raises:
      ConfigError: numbers of heads that do not divide.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_width: int | None = None,
        kv_heads: int | None = None,
        keys_width: int | None = None,
        bias: bool = True,
        key_bias: bool | None = None,
        out_bias: bool | None = None,
        inner_eps: float | None = None,
        gain: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.kv_heads = heads if kv_heads is None else kv_heads
        if (head_width is None and width % heads) or heads % self.kv_heads:
            raise ConfigError(
                f"attention of width {width}: expected heads that divide it (or a `head_width`) "
                f"and a multiple of the key-value heads, found {heads} and {self.kv_heads}."
            )
        size = width // heads if head_width is None else head_width
        outer = width if keys_width is None else keys_width
        key_bias, out_bias = (bias if given is None else given for given in (key_bias, out_bias))
        self.q_proj = Linear(width, heads * size, bias=bias, rngs=rngs)
        self.k_proj = Linear(outer, self.kv_heads * size, bias=key_bias, rngs=rngs)
        self.v_proj = Linear(outer, self.kv_heads * size, bias=bias, rngs=rngs)
        self.inner_norm = None if inner_eps is None else LayerNorm(heads * size, eps=inner_eps)
        self.out_proj = Linear(heads * size, width, bias=out_bias, gain=gain, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "#B T D"],
        *,
        keys: Float[Array, "B K C"] | None = None,
        values: Float[Array, "B K C"] | None = None,
        mask: AnyMask = None,
        bias: Bias | None = None,
        rope: Rope | None = None,
        tap: LayerTap | None = None,
        cache: LayerCache | None = None,
        key: Array | None = None,
    ) -> AttentionOutput:
        """Attends from `x` to `keys`.

        Args:
          keys: tokens to attend to; None is `x` itself.
          values: tokens to take from (DETR's keys have positions added, its values do not); None
            is `keys`.
          mask, bias, rope, tap, cache: see `multi_head`.
          key: for the dropout of LoRA; None drops nothing.
        """
        keys = x if keys is None else keys
        values = keys if values is None else values
        q_key, k_key, v_key, out_key = keys_of(key, 4)
        out = multi_head(
            self.q_proj(x, key=q_key),
            self.k_proj(keys, key=k_key),
            self.v_proj(values, key=v_key),
            heads=self.heads,
            kv_heads=self.kv_heads,
            mask=mask,
            bias=bias,
            rope=rope,
            tap=tap,
            cache=cache,
        )
        y = out.x if self.inner_norm is None else self.inner_norm(out.x)
        return dataclasses.replace(out, x=self.out_proj(y, key=out_key))


def _split(x: Float[Array, "B T D"], heads: int) -> Float[Array, "B T N H"]:
    x = x.reshape(*x.shape[:2], heads, -1)
    return constrain(x, "batch", None, "tensor")
