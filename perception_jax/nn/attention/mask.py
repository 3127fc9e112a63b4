"""Attention masks as conditions that kernels can use without a dense array.

Letters: B batch, N heads, T queries, K keys, Q rows of queries.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from perception_jax.errors import ConfigError

Mask = Bool[Array, "#B #N #T #K"]
"""A dense mask, True where a query may attend to a key."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """The keys that each query may attend to: those that meet all given conditions.

    A query without any key averages all values.

    Attributes:
      array: True where a query may attend to a key; axes of size 1 are shared.
      segments: ids of the queries' documents or windows; a query attends within its own.
      key_segments: those of the keys; None where queries and keys are the same tokens.
      lengths: how many keys of each example count, from the first on.
      start: position of the first query among the keys, for each example or all. None is 0, and
        then `causal` and `window` need as many keys as queries.
      causal: a query attends to no key behind it (static).
      window: a query attends to keys fewer than `window` positions away (static).
    """

    array: Mask | None = None
    segments: Int[Array, "#B T"] | None = None
    key_segments: Int[Array, "#B K"] | None = None
    lengths: Int[Array, "#B"] | None = None
    start: Int[Array, "#B"] | Int[Array, ""] | int | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def dense(
        self, queries: int, keys: int, rows: Int[Array, "*R Q"] | None = None
    ) -> Bool[Array, "#B #N #Q #K"] | None:
        """Returns a dense mask of all queries, or of `rows` of them ([Q] or [B, Q]).

        Raises:
          ConfigError: conditions that do not fit the numbers of queries and keys.
        """
        self._check(queries, keys)
        found = [] if self.array is None else [mask_rows(self.array, rows)]
        if self.segments is not None:
            own = self.segments if rows is None else _pick(self.segments, rows)
            other = self.segments if self.key_segments is None else self.key_segments
            found.append((own[:, :, None] == other[:, None])[:, None])
        position = jnp.arange(keys)
        if self.lengths is not None:
            found.append((position < self.lengths[:, None])[:, None, None])
        if self.causal or self.window is not None:
            ahead = position - self._positions(queries, rows)[..., None]
            if self.causal:
                found.append((ahead <= 0)[:, None])
            if self.window is not None:
                found.append((jnp.abs(ahead) < self.window)[:, None])
        joined = None
        for condition in found:
            joined = condition if joined is None else joined & condition
        return joined

    def seen(self, queries: int, keys: int) -> Bool[Array, "#B #N #T"] | None:
        """Which queries have a key at all; None where each has, as every token sees itself."""
        partial = (self.array, self.lengths, self.key_segments, self.start)
        if all(condition is None for condition in partial):
            return None
        return self.dense(queries, keys).any(axis=-1)

    def cached(self, lengths: Int[Array, "B"], queries: int) -> AttentionMask:
        """Returns the mask of new queries after `lengths` cached keys, which unused ones follow.

        Raises:
          ConfigError: segments, which a cache does not keep.
        """
        if self.segments is not None:
            raise ConfigError(
                "segments: a cache of keys keeps no segment ids. Leave segments out, or give "
                "`array` over the whole capacity of the cache."
            )
        start = lengths if self.start is None else self.start
        count = lengths + queries if self.lengths is None else self.lengths
        return dataclasses.replace(self, start=start, lengths=count)

    def _positions(self, queries: int, rows: Int[Array, "*R Q"] | None) -> Int[Array, "#B Q"]:
        of_rows = jnp.arange(queries) if rows is None else rows
        start = jnp.asarray(0 if self.start is None else self.start)
        return jnp.atleast_2d(of_rows) + start.reshape(-1, 1)

    def _check(self, queries: int, keys: int) -> None:
        ordered = self.causal or self.window is not None
        if ordered and self.start is None and queries != keys:
            raise ConfigError(
                f"a causal mask or a window over {queries} queries and {keys} keys: expected "
                "`start`, the position of the first query among the keys, where the numbers differ."
            )
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window: expected at least 1 position, found {self.window}.")
        if self.segments is None:
            if self.key_segments is not None:
                raise ConfigError("key_segments: expected `segments` of the queries with them.")
            return
        others = self.segments if self.key_segments is None else self.key_segments
        if (self.segments.shape[1], others.shape[1]) != (queries, keys):
            raise ConfigError(
                f"segments: expected an id for each of {queries} queries and {keys} keys, found "
                f"{self.segments.shape[1]} and {others.shape[1]}; where keys are other tokens, "
                "give `key_segments`."
            )


AnyMask = Mask | AttentionMask | None
"""A mask in any form; None lets every query attend to every key."""


def dense_mask(
    mask: AnyMask, queries: int, keys: int, rows: Int[Array, "*R Q"] | None = None
) -> Bool[Array, "#B #N #Q #K"] | None:
    """Returns the mask as one array, for all queries or for `rows`."""
    if isinstance(mask, AttentionMask):
        return mask.dense(queries, keys, rows)
    return None if mask is None else mask_rows(mask, rows)


def as_conditions(mask: AnyMask) -> AttentionMask:
    """Converts any mask to an `AttentionMask`."""
    return mask if isinstance(mask, AttentionMask) else AttentionMask(array=mask)


def mask_rows(mask: Mask, rows: Int[Array, "*R Q"] | None) -> Bool[Array, "#B #N #Q #K"]:
    """The rows of an array; `rows` is shared by the batch ([Q]) or per example ([B, Q])."""
    if rows is None or mask.shape[2] == 1:
        return mask
    if rows.ndim == 2 and mask.shape[0] == 1:
        mask = jnp.broadcast_to(mask, (rows.shape[0], *mask.shape[1:]))
    return take_rows(mask, rows, axis=2)


def take_rows(x: Array, rows: Int[Array, "*R Q"], axis: int) -> Array:
    """Rows of `x` along `axis`; `rows` is shared by the batch ([Q]) or per example ([B, Q])."""
    if rows.ndim == 1:
        return jnp.take(x, rows, axis=axis)
    return jax.vmap(lambda one, index: jnp.take(one, index, axis=axis - 1))(x, rows)


def _pick(segments: Int[Array, "#B T"], rows: Int[Array, "*R Q"]) -> Int[Array, "#B Q"]:
    if rows.ndim == 2 and segments.shape[0] == 1:
        segments = jnp.broadcast_to(segments, (rows.shape[0], segments.shape[1]))
    return take_rows(segments, rows, axis=1)
