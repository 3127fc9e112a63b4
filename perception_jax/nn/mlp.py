"""Feed-forward layers and activations. Letters: B batch, D width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.nn.dropout import keys_of
from perception_jax.nn.linear import Linear
from perception_jax.nn.norms import LayerNorm


def quick_gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`x * sigmoid(1.702 x)`, the activation of OpenAI's CLIP."""
    # The same function through tanh: on CPU a third of the time of XLA's logistic.
    return x * (0.5 + 0.5 * jnp.tanh(0.851 * x))


def gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The tanh approximation of GELU."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS: Mapping[str, Callable] = MappingProxyType(
    {
        "quick_gelu": quick_gelu,
        "gelu": gelu,
        "gelu_pytorch_tanh": gelu_tanh,
        "silu": jax.nn.silu,
        "relu": jax.nn.relu,
    }
)
"""Activations by the names of Hugging Face configurations."""
TOWER_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
"""Activations of the published image and text towers."""


class Mlp(nnx.Module):
    """`fc2(act(fc1(x)))`.

    Args:
      act: one of `ACTIVATIONS`.
      bias: whether both layers have a bias.
      gain: of the initial `fc2`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        act: str,
        bias: bool = True,
        gain: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.act = act
        self.fc1 = Linear(width, hidden, bias=bias, rngs=rngs)
        self.fc2 = Linear(hidden, width, bias=bias, gain=gain, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*B D"], *, key: Array | None = None
    ) -> Float[Array, "*B D"]:
        """Args: key: for the dropout of LoRA; None drops nothing."""
        first, second = keys_of(key, 2)
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x, key=first)), key=second)


class GatedMlp(nnx.Module):
    """`down(norm(act(gate(x)) * up(x)))` (Shazeer, arXiv 2002.05202); the norm is optional.

    Args:
      act: one of `ACTIVATIONS`; "silu" makes it a SwiGLU.
      bias: whether the layers have a bias (Llama's have none).
      inner_eps: of a norm over the hidden product (EVA-02's sub-LN); None has no such norm.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        act: str = "silu",
        bias: bool = True,
        inner_eps: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.act = act
        self.gate = Linear(width, hidden, bias=bias, rngs=rngs)
        self.up = Linear(width, hidden, bias=bias, rngs=rngs)
        self.inner_norm = None if inner_eps is None else LayerNorm(hidden, eps=inner_eps)
        self.down = Linear(hidden, width, bias=bias, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*B D"], *, key: Array | None = None
    ) -> Float[Array, "*B D"]:
        """Args: key: for the dropout of LoRA; None drops nothing."""
        gate, up, down = keys_of(key, 3)
        hidden = ACTIVATIONS[self.act](self.gate(x, key=gate)) * self.up(x, key=up)
        hidden = hidden if self.inner_norm is None else self.inner_norm(hidden)
        return self.down(hidden, key=down)
