"""A cache of keys and values of the previous tokens.

The arrays of all layers travel through a stack as one, updated in place. Heads come before tokens,
as the products of attention want them.
Letters: L layers, B batch, S capacity in tokens, T new tokens, M key-value heads, H head width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from perception_jax.errors import ConfigError
from perception_jax.ops.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KvCache:
    """Keys and values of all layers of a stack.

    Attributes:
      keys, values: what was written; behind `lengths` they mean nothing.
      lengths: tokens of each example so far.
      fresh: whether nothing has been written (static): the first tokens then attend to each
        other alone, as without a cache.
    """

    keys: Float[Array, "L B M S H"]
    values: Float[Array, "L B M S H"]
    lengths: Int[Array, " B"]
    fresh: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        *,
        depth: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_width: int,
        dtype: np.typing.DTypeLike = jnp.float32,
    ) -> KvCache:
        """Allocates a cache for `capacity` tokens of each example."""
        shape = (depth, batch, kv_heads, capacity, head_width)
        return cls(
            keys=_placed(jnp.zeros(shape, dtype)),
            values=_placed(jnp.zeros(shape, dtype)),
            lengths=jnp.zeros((batch,), jnp.int32),
            fresh=True,
        )

    @property
    def capacity(self) -> int:
        """Largest number of tokens of an example."""
        return self.keys.shape[3]

    def with_lengths(self, lengths: Int[Array, " B"]) -> KvCache:
        """Returns a copy with other lengths, e.g. without the padding after a prompt.

        What is after `lengths` is overwritten by the next tokens before any query sees it.
        """
        return dataclasses.replace(self, lengths=lengths, fresh=False)

    def advanced(self, count: int) -> KvCache:
        """Returns a copy with lengths increased by `count` tokens that were written."""
        return self.with_lengths(self.lengths + count)

    def grown(self, capacity: int) -> KvCache:
        """Returns a copy with a larger capacity.

        Raises:
          ConfigError: a smaller one.
        """
        if capacity < self.capacity:
            raise ConfigError(
                f"cache: expected a capacity of at least {self.capacity} tokens, found {capacity}."
            )
        more = ((0, 0), (0, 0), (0, 0), (0, capacity - self.capacity), (0, 0))
        keys, values = (_placed(jnp.pad(x, more)) for x in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values)

    def take(self, rows: Int[Array, " R"]) -> KvCache:
        """Returns the cache of some examples; a row may be repeated."""
        keys, values = (_placed(x[:, rows]) for x in (self.keys, self.values))
        return dataclasses.replace(self, keys=keys, values=values, lengths=self.lengths[rows])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """The part of a `KvCache` for one layer.

    Attributes:
      stack: the cache of all layers.
      layer: which one; a number or a traced scalar.
    """

    stack: KvCache
    layer: Int[Array, ""] | int

    @property
    def lengths(self) -> Int[Array, " B"]:
        """Number of cached tokens of each example, without new ones."""
        return self.stack.lengths

    def write(self, k: Float[Array, "B T M H"], v: Float[Array, "B T M H"]) -> LayerCache:
        """Appends new tokens; `lengths` are not changed. What does not fit is left out.

        Raises:
          ConfigError: more new tokens than the capacity.
        """
        batch, count = k.shape[:2]
        if count > self.stack.capacity:
            raise ConfigError(
                f"a cache for {self.stack.capacity} tokens cannot take {count} at once: make it "
                "with the capacity of the longest text and all that is generated."
            )
        example, head = jnp.ix_(jnp.arange(batch), jnp.arange(k.shape[2]))
        place = (self.layer, example[..., None], head[..., None], self.positions(count)[:, None])

        def written(old: Array, new: Array) -> Array:
            new = new.swapaxes(1, 2).astype(old.dtype)
            if self.stack.fresh:  # all at the same place: one slice
                return jax.lax.dynamic_update_slice(old, new[None], (self.layer, 0, 0, 0, 0))
            return old.at[place].set(new, mode="drop")

        keys = _placed(written(self.stack.keys, k))
        values = _placed(written(self.stack.values, v))
        stack = dataclasses.replace(self.stack, keys=keys, values=values)
        return dataclasses.replace(self, stack=stack)

    def read(self) -> tuple[Float[Array, "B S M H"], Float[Array, "B S M H"]]:
        """Returns all keys and values of the layer, including those after `lengths`."""
        keys, values = (x[self.layer] for x in (self.stack.keys, self.stack.values))
        return keys.swapaxes(1, 2), values.swapaxes(1, 2)

    def positions(self, count: int) -> Int[Array, "B T"]:
        """Places of `count` new tokens."""
        return self.stack.lengths[:, None] + jnp.arange(count)

    def overflows(self, count: int) -> Bool[Array, "B T"]:
        """Which of `count` new tokens do not fit."""
        return self.positions(count) >= self.stack.capacity


def _placed(x: Float[Array, "L B M S H"]) -> Float[Array, "L B M S H"]:
    return constrain(x, None, "batch", "tensor")
