"""Taps: requests for intermediate values of a transformer and for gradients with respect to them.

A tap is an ordinary argument and its record an ordinary output, so both work under `jit`, `scan`,
`remat` and `grad` and nothing is hidden in a module. Only the requested layers and query rows are
recomputed as probabilities: memory is [layers, B, N, rows, keys], never L x T x T.

    taps = Taps(attention=(-1,), rows=jnp.array([0]))            # last layer, CLS row
    out = model.image(pixels, taps=taps)
    out.attention                                                # [1, B, N, 1, T]

Gradients with respect to attention, as Grad-CAM-like methods need: give zero `probes` and
differentiate a score with respect to them; the attention output is linear in the probabilities.

    def score(probes):
        return model.image(pixels, taps=taps.with_probes(probes)).embedding[:, 7].sum()
    gradient = jax.grad(score)(taps.zeros(depth=12, batch=B, heads=N, keys=T))

A tower that pools by attention (SigLIP) records and probes its head in the same way: `pool` and
`pool_probe`.

Letters: L layers, B batch, N heads, Q query rows, K keys, T tokens.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from perception_jax.errors import ConfigError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "probes", "pool_probe"),
    meta_fields=("attention", "cross", "hidden", "pool", "inserts"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Taps:
    """The intermediate values to record.

    Attributes:
      attention: layers whose attention probabilities are recorded; negative counts from the end.
      cross: layers whose cross-attention probabilities are recorded, in the same rows.
      hidden: hidden states to record: 0 is the input of the first block, k the output of block
        k - 1 (the numbering of Hugging Face); negative counts from the end.
      rows: int[Q] query positions for the whole batch, or int[B, Q] per example; None is all.
      probes: float[L, B, N, Q, K] added to the recorded probabilities where they meet the values;
        zeros by intent, there to be differentiated through. L follows `attention` in layer order.
      pool: whether the attention of the pooling head is recorded; image towers without such a
        head refuse.
      pool_probe: float[B, N, T], for the head what `probes` is for the layers; implies `pool`.
      inserts: layers whose insert's attention is recorded whole, [B, N, T, K]; see `nn.stack`.
    """

    attention: tuple[int, ...] = ()
    cross: tuple[int, ...] = ()
    hidden: tuple[int, ...] = ()
    rows: Int[Array, "*R Q"] | None = None
    probes: Float[Array, "L B N Q K"] | None = None
    pool: bool = False
    pool_probe: Float[Array, "B N T"] | None = None
    inserts: tuple[int, ...] = ()

    def with_probes(self, probes: Float[Array, "L B N Q K"]) -> Taps:
        """Returns these taps with `probes`, to differentiate with respect to them."""
        return dataclasses.replace(self, probes=probes)

    def with_pool_probe(self, probe: Float[Array, "B N T"]) -> Taps:
        """Returns these taps with a probe of the pooling head."""
        return dataclasses.replace(self, pool_probe=probe)

    @property
    def of_pool(self) -> PoolTap | None:
        """The part that concerns the pooling head."""
        asked = self.pool or self.pool_probe is not None
        return PoolTap(probe=self.pool_probe) if asked else None

    def zeros(self, *, depth: int, batch: int, heads: int, keys: int) -> Float[Array, "L B N Q K"]:
        """Zero probes of the right shape for a stack of `depth` blocks."""
        layers = len(layer_indices(self.attention, depth))
        queries = keys if self.rows is None else self.rows.shape[-1]
        return jnp.zeros((layers, batch, heads, queries, keys))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("rows", "probe"), meta_fields=())
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerTap:
    """The part of `Taps` for one attention layer."""

    rows: Int[Array, "*R Q"] | None = None
    probe: Float[Array, "B N Q K"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolTap:
    """The part of `Taps` for an attention pooling head."""

    probe: Float[Array, "B N T"] | None = None


def refuse_pool(taps: Taps | None) -> None:
    """Raises an error for taps of a pooling head, for a tower without one.

    Raises:
      ConfigError: `taps` ask for a pooling head.
    """
    if taps is not None and taps.of_pool is not None:
        raise ConfigError(
            "taps request the attention of a pooling head, but this tower is read at its class "
            "token (of texts: the end token): tap a layer's row of that token instead, e.g. "
            "Taps(attention=(-1,), rows=jnp.array([0]))."
        )


def layer_indices(layers: tuple[int, ...], depth: int, start: int = 0) -> tuple[int, ...]:
    """Sorted, unique, non-negative indices into the entries `start` to `depth` of a stack.

    Negative ones count from `depth`.

    Raises:
      ConfigError: an index of no such entry.
    """
    found = set()
    for index in layers:
        place = index + depth if index < 0 else index
        if not start <= place < depth:
            what = f"the stack has {depth}" if start == 0 else f"{start} to {depth - 1} run"
            raise ConfigError(
                f"tap on layer {index}, but {what}: expected an index in [{start}, {depth - 1}], "
                f"or one from {start - depth} to -1 from the end."
            )
        found.add(place)
    return tuple(sorted(found))
