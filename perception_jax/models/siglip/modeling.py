"""SigLIP: CLIP's two towers with a sigmoid loss (Zhai et al., arXiv 2303.15343).

The image tower has no class token and pools by attention; the text tower sees in both directions
and is read at its last position. Letters: B batch, T tokens, D width.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.models.siglip.config import SiglipConfig, SiglipVisionConfig
from perception_jax.nn.attention import Attention
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.pooling import MapHead
from perception_jax.nn.taps import Taps
from perception_jax.nn.text_tower import TextTower
from perception_jax.nn.towers import TowerOutput, TwoTowers
from perception_jax.nn.transformer import Block
from perception_jax.nn.vit import VisionTransformer
from perception_jax.ops.sharding import constrain


class SiglipVisionTower(VisionTransformer):
    """SigLIP's image tower: pixels to tokens and a joint embedding.

    Tokens are behind the final norm (the last hidden state of Hugging Face), pooled token and
    embedding are the output of the attention pooling.
    """

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs):
        width = config.width
        super().__init__(
            functools.partial(_block, config),
            width=width,
            depth=config.depth,
            patch_size=config.patch_size,
            positions=config.tokens,
            eps=config.eps,
            class_scale=None,
            position_scale=width**-0.5,
            rngs=rngs,
        )
        self.head = MapHead(
            width, config.heads, config.mlp_dim, act=config.act, eps=config.eps, rngs=rngs
        )

    def read(self, x: Float[Array, "B T D"], taps: Taps | None) -> TowerOutput:
        """Pools the normalised tokens with the attention head."""
        tokens = constrain(self.norm_post(x), "batch")
        pooled, attention = self.head(tokens, tap=None if taps is None else taps.of_pool)
        return TowerOutput(embedding=pooled, pooled=pooled, tokens=tokens, pool_attention=attention)


class Siglip(TwoTowers):
    """Both towers, the learned temperature (stored as a logarithm) and the logit bias."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.vision = SiglipVisionTower(config.vision, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.asarray(10.0, jnp.float32)))
        self.logit_bias = nnx.Param(jnp.asarray(-10.0, jnp.float32))


def _block(config: SiglipVisionConfig, rngs: nnx.Rngs) -> Block:
    attention = Attention(config.width, config.heads, rngs=rngs)
    mlp = Mlp(config.width, config.mlp_dim, act=config.act, rngs=rngs)
    return Block(config.width, attention, mlp, eps=config.eps)
