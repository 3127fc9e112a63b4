"""The "plus" profile: further losses from boxes, altered captions and a generic instruction.

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
    """Settings of the "plus" profile.

    Attributes:
      dense: weight of the loss on the place of the object; 0 leaves it out.
      altered: whether captions with one attribute changed are hard negatives of OITC.
      generic: weight of the loss that keeps the embedding for the instruction "the image" equal to
        that without an instruction; 0 leaves it out.
    """

    dense: float = 0.0
    altered: bool = False
    generic: float = 0.0


GENERIC_EVERY = 10
"""Every n-th row is also encoded under the generic instruction; this is n."""


def dense_loss(
    present: Float[Array, "M P"], absent: Float[Array, "M P"], covered: Float[Array, "M P"]
) -> Float[Array, ""]:
    """Loss on the place of the object: cross-entropy of the softmax over patches with the share of
    the object that each covers; for the absent class, the largest logit should be negative.

    Rows without a box count for the absent part only.
    """
    mass = covered.sum(axis=1, keepdims=True)
    target = covered / jnp.maximum(mass, 1e-6)
    cross = -jnp.sum(target * jax.nn.log_softmax(present, axis=1), axis=1)
    known = (mass[:, 0] > 0).astype(jnp.float32)
    found = jnp.sum(cross * known) / jnp.maximum(known.sum(), 1.0)
    return found + jnp.mean(jax.nn.softplus(absent.max(axis=1)))


def generic_loss(conditioned: Float[Array, "M E"], static: Float[Array, "M E"]) -> Float[Array, ""]:
    """Mean of 1 - cosine of unit embeddings with the generic instruction and without one."""
    return jnp.mean(1.0 - jnp.sum(conditioned * jax.lax.stop_gradient(static), axis=1))
