"""Dropout of units and of whole residual branches. Letters: B batch.

Keys are arguments: a call without one drops nothing, and one with a key depends on nothing else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from perception_jax.errors import ConfigError


def dropout(x: Float[Array, "*B"], rate: float, key: Array | None) -> Float[Array, "*B"]:
    """Zeroes each unit with probability `rate` and divides the others by `1 - rate`.

    Args:
      key: None, for evaluation, returns `x`.

    Raises:
      ConfigError: a rate outside [0, 1).
    """
    _check(rate)
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def drop_path(
    x: Float[Array, "B *D"], rate: float | Float[Array, ""], key: Array | None
) -> Float[Array, "B *D"]:
    """Zeroes a residual branch of whole examples (stochastic depth, arXiv 1603.09382).

    Args:
      x: the branch, before it is added.
      rate: probability; may be traced, as it differs from layer to layer.
      key: None, for evaluation, returns `x`.

    Raises:
      ConfigError: a rate outside [0, 1).
    """
    fixed = not isinstance(rate, jax.Array)
    if fixed:
        _check(rate)
    if key is None or (fixed and rate == 0.0):
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    kept = jnp.asarray(1.0 - rate, jnp.float32)
    factor = jnp.where(jax.random.bernoulli(key, kept, shape), 1.0 / kept, 0.0)
    return x * factor.astype(x.dtype)


def keys_of(key: Array | None, count: int) -> list[Array | None]:
    """Splits a key for several places that drop something; all None without one."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def _check(rate: float) -> None:
    if not 0.0 <= rate < 1.0:
        raise ConfigError(f"dropout rate: expected a number in [0, 1), found {rate}.")
