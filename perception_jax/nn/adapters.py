"""Trainable layers for a frozen model; what trains is selected by type, not by name.

`nnx.split(model, AdapterParam, ...)` separates them from the frozen leaves, which then have no
gradient and no optimizer state. `nn.stack.Inserted` puts such layers into a stack of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.nn.linear import Linear
from perception_jax.nn.norms import LayerNorm


class AdapterParam(nnx.Param):
    """A trainable parameter that a method adds to a frozen model."""


def adapter_linear(
    inputs: int, outputs: int, *, bias: bool = True, zero: bool = False, rngs: nnx.Rngs
) -> Linear:
    """Makes a trainable linear layer with weights and bias uniform in ±1/√inputs, or zero."""
    layer = Linear(inputs, outputs, bias=bias, rngs=rngs)
    bound = 0.0 if zero else inputs**-0.5

    def draw(*shape: int) -> AdapterParam:
        return AdapterParam(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

    layer.kernel = draw(inputs, outputs)
    layer.bias = draw(outputs) if bias else None
    return layer


def adapter_norm(width: int, *, eps: float) -> LayerNorm:
    """Makes a trainable layer norm."""
    norm = LayerNorm(width, eps=eps)
    norm.scale, norm.bias = AdapterParam(norm.scale[...]), AdapterParam(norm.bias[...])
    return norm


SPREAD = 12
"""Number of adapters of the placement "spread"."""


def placed(layers: Sequence[int] | str, depth: int) -> tuple[int, ...]:
    """The blocks that get an adapter, in a tower of `depth` blocks.

    Args:
      layers: numbers of blocks from 0, ascending, or a name: "spread" (`SPREAD` blocks at equal
        distances, the last block among them; all blocks of a tower with fewer), "all", "first
        half", "last half".

    Raises:
      ConfigError: an unknown name, or blocks that the tower lacks or out of order.
    """
    if isinstance(layers, str):
        count = min(SPREAD, depth)
        known = {
            "spread": tuple((k + 1) * depth // count - 1 for k in range(count)),
            "all": tuple(range(depth)),
            "first half": tuple(range(depth // 2)),
            "last half": tuple(range(depth // 2, depth)),
        }
        if layers not in known:
            raise ConfigError(
                f"adapter layers: expected numbers of blocks or one of {', '.join(known)}, found "
                f"{layers!r}."
            )
        return known[layers]
    ascending = list(layers) == sorted(set(layers))
    if not ascending or not layers or layers[0] < 0 or layers[-1] >= depth:
        raise ConfigError(
            f"adapter layers: expected ascending numbers of blocks in [0, {depth - 1}], found "
            f"{list(layers)}."
        )
    return tuple(layers)
