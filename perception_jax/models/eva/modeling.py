"""EVA-CLIP (Sun et al., arXiv 2303.15389) around the image towers that timm calls `Eva`.

EVA-02 is Fang et al., arXiv 2303.11331. The text tower is CLIP's with exact GELU. Letters: B batch,
T tokens, D width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.models.eva.config import EvaConfig, EvaVisionConfig
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import Linear
from perception_jax.nn.mlp import GatedMlp, Mlp
from perception_jax.nn.rope import Rope, axial
from perception_jax.nn.taps import Taps
from perception_jax.nn.text_tower import TextTower
from perception_jax.nn.towers import TowerOutput, TwoTowers
from perception_jax.nn.transformer import Block
from perception_jax.nn.vit import VisionTransformer
from perception_jax.ops.sharding import constrain


class EvaVisionTower(VisionTransformer):
    """EVA-CLIP's image tower: pixels to tokens and a joint embedding.

    Tokens are behind the final norm, pooled is the class token among them.
    """

    def __init__(self, config: EvaVisionConfig, embed_dim: int, *, rngs: nnx.Rngs):
        super().__init__(
            functools.partial(_block, config),
            width=config.width,
            depth=config.depth,
            patch_size=config.patch_size,
            positions=config.tokens,
            eps=config.eps,
            rngs=rngs,
        )
        self.rotary = config.kind == "eva02_rope"
        self.reference_grid = config.reference_grid
        self.head_width = config.width // config.heads
        self.projection = Linear(config.width, embed_dim, rngs=rngs)

    def rope(self, grid: tuple[int, int]) -> Rope | None:
        """Rotary positions for a grid of patches; None for the towers without them."""
        if not self.rotary:
            return None
        return axial(grid, self.head_width, reference=self.reference_grid, prefix=self.prefix)

    def read(self, x: Float[Array, "B T D"], taps: Taps | None) -> TowerOutput:
        """Computes the normalised class token and its projection."""
        out = super().read(x, taps)
        embedding = constrain(self.projection(out.pooled), "batch")
        return dataclasses.replace(out, embedding=embedding)


class Eva(TwoTowers):
    """Both towers and the learned temperature (stored as a logarithm)."""

    def __init__(self, config: EvaConfig, *, rngs: nnx.Rngs):
        self.vision = EvaVisionTower(config.vision, config.embed_dim, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592, jnp.float32))


def _block(config: EvaVisionConfig, rngs: nnx.Rngs) -> Block:
    width, eps = config.width, config.eps
    inner = eps if config.kind == "eva02_rope" else None
    attention = Attention(width, config.heads, key_bias=False, inner_eps=inner, rngs=rngs)
    if config.kind == "eva02_rope":
        mlp = GatedMlp(width, config.mlp_dim, inner_eps=eps, rngs=rngs)
    else:
        mlp = Mlp(width, config.mlp_dim, act="gelu", rngs=rngs)
    norm = "res_post" if config.kind == "eva02_post_norm" else "pre"
    return Block(width, attention, mlp, eps=eps, norm=norm)
