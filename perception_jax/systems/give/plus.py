"""The "plus" profile: what GiVE gains from boxes and from captions that cannot be copied.

This library's own, after ideas of SteerViT (arXiv 2604.02327: dense supervision), LIVE (arXiv
2606.19584: targets that do not repeat the instruction) and FG-CLIP (arXiv 2505.05071: captions with
one attribute changed). Letters: M rows, P patches, D image width, E embedding width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlusConfig:
    """Attributes:
    dense: weight of the loss on where the object is; 0 leaves it out.
    altered: whether captions with one attribute changed are further columns of OITC.
    generic: weight of the loss that keeps "the image" like no instruction at all; 0 leaves it out.
    """

    dense: float = 0.0
    altered: bool = False
    generic: float = 0.0


GENERIC_EVERY = 10
"""One row of so many is also encoded under the generic instruction."""


def coverage(boxes: Float[Array, "M 4"], grid: tuple[int, int], size: int) -> Float[Array, "M P"]:
    """The share of each patch that a box covers.

    Args:
      boxes: xyxy in pixels of the model's square image; without area where there is none.
      grid: rows and columns of patches.
      size: side of the image.
    """

    def overlap(low: Array, high: Array, count: int) -> Float[Array, "M n"]:
        edges = jnp.arange(count + 1) * (size / count)
        inside = jnp.minimum(high[:, None], edges[1:]) - jnp.maximum(low[:, None], edges[:-1])
        return jnp.maximum(inside, 0.0) * (count / size)

    across = overlap(boxes[:, 0], boxes[:, 2], grid[1])
    down = overlap(boxes[:, 1], boxes[:, 3], grid[0])
    return (down[:, :, None] * across[:, None, :]).reshape(len(boxes), -1)


def dense_loss(
    present: Float[Array, "M P"], absent: Float[Array, "M P"], covered: Float[Array, "M P"]
) -> Float[Array, ""]:
    """Where is it? Cross-entropy of the patches with the share of each that the object covers; for
    what is absent, no patch may say that it is there.

    Rows without a box count for the absent part only.
    """
    mass = covered.sum(axis=1, keepdims=True)
    target = covered / jnp.maximum(mass, 1e-6)
    cross = -jnp.sum(target * jax.nn.log_softmax(present, axis=1), axis=1)
    known = (mass[:, 0] > 0).astype(jnp.float32)
    found = jnp.sum(cross * known) / jnp.maximum(known.sum(), 1.0)
    return found + jnp.mean(jax.nn.softplus(absent.max(axis=1)))


def generic_loss(steered: Float[Array, "M E"], static: Float[Array, "M E"]) -> Float[Array, ""]:
    """1 - cosine of unit embeddings."""
    return jnp.mean(1.0 - jnp.sum(steered * jax.lax.stop_gradient(static), axis=1))
