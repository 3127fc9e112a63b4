"""DINOv2 (Oquab et al., arXiv 2304.07193), with registers (Darcet et al., arXiv 2309.16588)."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx

from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.nn.attention import Attention
from perception_jax.nn.mlp import GatedMlp, Mlp
from perception_jax.nn.transformer import Block
from perception_jax.nn.vit import VisionTransformer


class Dinov2(VisionTransformer):
    """DINOv2: pixels to tokens; pooled and embedding are the normalised class token.

    Token order: class token, registers, patches. Tokens are behind the final norm.
    """

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        super().__init__(
            functools.partial(_block, config),
            width=config.width,
            depth=config.depth,
            patch_size=config.patch_size,
            positions=config.positions,
            eps=config.eps,
            registers=config.registers,
            antialias=config.position_antialias,
            offset=config.position_offset,
            rngs=rngs,
        )
        # For masked training; kept for exports.
        self.mask_token = nnx.Param(jnp.zeros((config.width,)))


def _block(config: Dinov2Config, rngs: nnx.Rngs) -> Block:
    attention = Attention(config.width, config.heads, rngs=rngs)
    if config.mlp == "swiglu":
        mlp = GatedMlp(config.width, config.mlp_dim, rngs=rngs)
    else:
        mlp = Mlp(config.width, config.mlp_dim, act="gelu", rngs=rngs)
    return Block(config.width, attention, mlp, eps=config.eps, layer_scale=config.layer_scale)
