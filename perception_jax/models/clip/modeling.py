"""CLIP: two transformers with a joint embedding space (Radford et al., arXiv 2103.00020).

The image tower is a pre-norm ViT with a class token and a norm before the blocks; the text tower
is causal and pooled at the end token. Serves OpenAI's, MetaCLIP's, DFN's and LAION's weights.
Letters: B batch, T tokens, D width.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.nn import stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import Linear
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.taps import Taps, refuse_pool
from perception_jax.nn.text_tower import TextTower
from perception_jax.nn.towers import TowerOutput, TwoTowers
from perception_jax.nn.transformer import Block
from perception_jax.nn.vit import VisionTransformer
from perception_jax.ops.sharding import constrain


class ClipVisionTower(VisionTransformer):
    """CLIP's image tower: pixels to tokens and a joint embedding.

    Tokens are without the final norm (the last hidden state of Hugging Face), pooled is the class
    token behind `norm_post`.
    """

    normed_tokens = False

    def __init__(self, config: VisionConfig, embed_dim: int, *, rngs: nnx.Rngs):
        width = config.width
        super().__init__(
            functools.partial(_block, config),
            width=width,
            depth=config.depth,
            patch_size=config.patch_size,
            positions=config.tokens,
            eps=config.eps,
            patch_bias=False,
            class_scale=width**-0.5,
            position_scale=width**-0.5,
            norm_pre=True,
            rngs=rngs,
        )
        self.projection = Linear(width, embed_dim, bias=False, rngs=rngs)

    def read(self, x: Float[Array, "B T D"], taps: Taps | None) -> TowerOutput:
        """Computes the normalised class token and its projection."""
        refuse_pool(taps)
        pooled = constrain(self.norm_post(x[:, 0]), "batch")
        embedding = constrain(self.projection(pooled), "batch")
        return TowerOutput(embedding=embedding, pooled=pooled, tokens=x)


class Clip(TwoTowers):
    """Both towers and the learned temperature (stored as a logarithm)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.vision = ClipVisionTower(config.vision, config.embed_dim, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init, jnp.float32))


def _block(config: VisionConfig, rngs: nnx.Rngs) -> Block:
    gain = stack.residual_gain(config.depth)
    attention = Attention(config.width, config.heads, gain=gain, rngs=rngs)
    mlp = Mlp(config.width, config.mlp_dim, act=config.act, gain=gain, rngs=rngs)
    return Block(config.width, attention, mlp, eps=config.eps)
