"""Where a tower looks: attention and gradient maps over patches, from any tower with a class token.

All maps are float32 on the patch grid, [B, rows, columns], and come from the same forward pass
that gives the embedding. Letters: B batch, H W image, N heads, P patches, E embedding width.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from perception_jax.errors import ConfigError
from perception_jax.nn.taps import Taps
from perception_jax.nn.towers import TowerOutput
from perception_jax.ops.losses import unit

CLASS_ROW = 0


@runtime_checkable
class Tower(Protocol):
    """An image tower whose token 0 is the class token."""

    def __call__(self, pixels: Float[Array, "B H W 3"], *, taps: Taps | None) -> TowerOutput:
        """Encodes normalised pixels and records what `taps` asks for."""


def class_attention(
    tower: Tower, pixels: Float[Array, "B H W 3"], *, layer: int = -1
) -> Float[Array, "B rows columns"]:
    """Attention of the class token to each patch, averaged over heads."""
    taps = Taps(attention=(layer,), rows=jnp.array([CLASS_ROW]))
    attention = tower(pixels, taps=taps).attention
    return _to_grid(attention[0, :, :, 0, 1:].mean(axis=1))


def text_relevance(
    tower: Tower,
    pixels: Float[Array, "B H W 3"],
    texts: Float[Array, "B E"],
    *,
    layer: int = -1,
) -> Float[Array, "B rows columns"]:
    """Which patches speak for a text: attention × gradient of the cosine, positive part, mean
    over heads (Chefer et al., arXiv 2103.15679, eq. 5, for one layer's class row).

    Args:
      texts: one embedding for each image, of any length.
    """
    taps = Taps(attention=(layer,), rows=jnp.array([CLASS_ROW]))

    def score(probes: Array) -> tuple[Array, Array]:
        out = tower(pixels, taps=taps.with_probes(probes))
        cosine = jnp.sum(unit(out.embedding) * unit(texts), axis=-1)
        return cosine.sum(), out.attention

    shape = jax.eval_shape(lambda: tower(pixels, taps=taps).attention).shape
    gradient, attention = jax.grad(score, has_aux=True)(jnp.zeros(shape))
    relevance = jax.nn.relu(gradient * attention)[0, :, :, 0, 1:].mean(axis=1)
    return _to_grid(relevance)


def pixel_gradient(
    tower: Tower,
    pixels: Float[Array, "B H W 3"],
    texts: Float[Array, "B E"],
) -> Float[Array, "B H W"]:
    """Length of the gradient of the cosine with a text, over colours, for each pixel."""

    def score(pixels: Array) -> Array:
        return jnp.sum(unit(tower(pixels, taps=None).embedding) * unit(texts))

    return jnp.linalg.norm(jax.grad(score)(pixels).astype(jnp.float32), axis=-1)


def _to_grid(patches: Float[Array, "B P"]) -> Float[Array, "B rows columns"]:
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ConfigError(
            f"expected a square grid of patches, found {patches.shape[1]} of them: maps need "
            "square images, and a tower whose only extra token is the class token."
        )
    return patches.reshape(-1, side, side)
