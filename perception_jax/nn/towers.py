"""Shared parts of image and text towers: output, class token, comparison of embeddings.

Letters: B batch (of images), T tokens or texts, P patches, D width, L layers, N heads, Q query
rows, S recorded states, I recorded inserts with A heads and K condition tokens, E embedding width,
R registers.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from perception_jax.ops.losses import unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerOutput:
    """Output of one tower.

    Attributes:
      embedding: in the joint space, not normalised; None for a tower without one.
      pooled: the pooled token after the final norm, before any projection.
      tokens: all tokens; the tower's `normed_tokens` says whether after the final norm.
      hidden: hidden states requested by `Taps.hidden`, in layer order.
      attention: attention rows requested by `Taps.attention`, in layer order.
      pool_attention: of the attention pooling, requested by `Taps.pool`.
      inserts: attention of inserts requested by `Taps.inserts`, in layer order.
      grid: rows and columns of patches (static); None for texts.
      prefix: tokens before the patches: class token and registers (static).
    """

    embedding: Float[Array, "B E"] | None
    pooled: Float[Array, "B D"]
    tokens: Float[Array, "B T D"]
    hidden: Float[Array, "S B T D"] | None = None
    attention: Float[Array, "L B N Q T"] | None = None
    pool_attention: Float[Array, "B N T"] | None = None
    inserts: Float[Array, "I B A T K"] | None = None
    grid: tuple[int, int] | None = dataclasses.field(default=None, metadata={"static": True})
    prefix: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def patches(self) -> Float[Array, "B P D"]:
        """The tokens of the patches, row-major on `grid`."""
        return self.tokens[:, self.prefix :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveOutput:
    """Embeddings of images and texts with their scaled cosines.

    Attributes:
      image_embeds, text_embeds: unit vectors, float32.
      logits_per_image: scaled cosines of every image with every text, plus the bias, float32.
    """

    image_embeds: Float[Array, "B E"]
    text_embeds: Float[Array, "T E"]
    logits_per_image: Float[Array, "B T"]


def contrast(
    image: Float[Array, "B E"],
    text: Float[Array, "T E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
) -> ContrastiveOutput:
    """Compares embeddings of any length: `exp(logit_scale) * cosine + logit_bias`, in float32."""
    image, text = unit(image), unit(text)
    logits = jnp.exp(logit_scale.astype(jnp.float32)) * image @ text.T
    if logit_bias is not None:
        logits = logits + logit_bias.astype(jnp.float32)
    return ContrastiveOutput(image_embeds=image, text_embeds=text, logits_per_image=logits)


class TwoTowers(nnx.Module):
    """An image tower `vision`, a text tower `text`, a temperature `logit_scale` (stored as a
    logarithm) and, where there is one, a `logit_bias`."""

    logit_bias: nnx.Param | None = None

    def __call__(
        self, pixels: Float[Array, "B H W 3"], ids: Int[Array, "T K"]
    ) -> ContrastiveOutput:
        """Compares every image with every text."""
        image = self.vision(pixels).embedding
        text = self.text(ids, dtype=pixels.dtype).embedding
        bias = None if self.logit_bias is None else self.logit_bias[...]
        return contrast(image, text, self.logit_scale[...], bias)


def with_class_token(
    patches: Float[Array, "B P D"],
    class_token: Float[Array, "D"],
    positions: Float[Array, "1+P D"],
    registers: Float[Array, "R D"] | None = None,
) -> Float[Array, "B T D"]:
    """Class token, registers, patches; positions are added to all but the registers."""
    positions = positions.astype(patches.dtype)
    front = [class_token.astype(patches.dtype)[None] + positions[:1]]
    if registers is not None:
        front.append(registers.astype(patches.dtype))
    start = jnp.concatenate(front)
    start = jnp.broadcast_to(start, (patches.shape[0], *start.shape))
    return jnp.concatenate([start, patches + positions[1:]], axis=1)
