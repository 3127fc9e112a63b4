"""Trainable layers for a frozen model; what trains is selected by type, not by name.

`nnx.split(model, AdapterParam, ...)` separates them from the frozen leaves, which then have no
gradient and no optimizer state. `nn.stack.Inserted` puts such layers into a stack of blocks.
"""

from __future__ import annotations

import jax
from flax import nnx

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
