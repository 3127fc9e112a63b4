"""A DINOv2 tower with the projectors of its training. Letters: B batch, P patches, D width."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.models.dinov2.modeling import Dinov2
from perception_jax.nn.linear import Linear
from perception_jax.nn.norms import LayerNorm


class Expander(nnx.Module):
    """Three linear layers; LayerNorm and ReLU between them, so that rows stay independent.

    The papers' expanders have batch normalisation there.
    """

    def __init__(self, inputs: int, width: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(inputs, width, rngs=rngs)
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.fc2 = Linear(width, width, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.fc3 = Linear(width, width, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        x = jax.nn.relu(self.norm1(self.fc1(x)))
        x = jax.nn.relu(self.norm2(self.fc2(x)))
        return self.fc3(x)


class SelfSupervised(nnx.Module):
    """The tower, which is what an export keeps, and one projector each for images and patches."""

    def __init__(self, config: Dinov2Config, projector: int, *, rngs: nnx.Rngs):
        """Args: projector: width of the projectors and of their outputs."""
        self.tower = Dinov2(config, rngs=rngs)
        self.image_projector = Expander(config.width, projector, rngs=rngs)
        self.patch_projector = Expander(config.width, projector, rngs=rngs)
