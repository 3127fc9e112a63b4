"""The toy: mean colour of an image, times a matrix, times a gain."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.nn.linear import Linear
from tests.toy_model.config import ToyConfig


class Toy(nnx.Module):
    """Pixels to an embedding."""

    def __init__(self, config: ToyConfig, *, rngs: nnx.Rngs):
        self.linear = Linear(3, config.width, rngs=rngs)
        self.gain = nnx.Param(jnp.ones((config.width,)))

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
        return self.linear(pixels.mean(axis=(1, 2))) * self.gain[...]
