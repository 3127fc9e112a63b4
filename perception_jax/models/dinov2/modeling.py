"""DINOv2 (Oquab et al., arXiv 2304.07193), with registers (Darcet et al., arXiv 2309.16588).

Letters: B batch, H W image, P patches, D width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.models.dinov2.config import Dinov2Config
from perception_jax.nn import position, stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import PatchEmbed
from perception_jax.nn.mlp import Mlp, SwiGlu
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.taps import Taps, refuse_pool
from perception_jax.nn.towers import TowerOutput, with_class_token
from perception_jax.nn.transformer import Block
from perception_jax.ops.sharding import constrain


class Dinov2(nnx.Module):
    """Pixels to tokens; the embedding is the class token after the final norm."""

    normed_tokens = True

    def __init__(self, config: Dinov2Config, *, rngs: nnx.Rngs):
        width = config.width
        self.position_offset = config.position_offset
        self.position_antialias = config.position_antialias
        self.prefix = 1 + config.registers
        self.patch_embed = PatchEmbed(config.patch_size, width, bias=True, rngs=rngs)
        self.class_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.mask_token = nnx.Param(jnp.zeros((width,)))  # for masked training; kept for exports
        self.register_tokens = (
            nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.registers, width)))
            if config.registers
            else None
        )
        self.position_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.positions, width))
        )
        self.blocks = stack.init(functools.partial(_block, config), config.depth, rngs=rngs)
        self.norm_post = LayerNorm(width, eps=config.eps)

    def positions(self, grid: tuple[int, int]) -> Float[Array, "N D"]:
        """What is added to the tokens of a grid of patches, resized as the settings say."""
        return position.resample(
            self.position_embedding[...],
            grid,
            prefix=1,
            antialias=self.position_antialias,
            offset=self.position_offset,
        )

    def __call__(
        self,
        pixels: Float[Array, "B H W 3"],
        *,
        taps: Taps | None = None,
        context: stack.Context | None = None,
        depth: int | None = None,
        remat: bool = False,
    ) -> TowerOutput:
        """Encodes normalised pixels of any size.

        Token order: class token, registers, patches. Hidden states have no final norm.

        Returns:
          `tokens` after the final norm, `pooled` and `embedding` the class token among them.
        """
        refuse_pool(taps)
        pixels = constrain(pixels, "batch")
        grid = self.patch_embed.grid(pixels)
        positions = self.positions(grid)
        registers = None if self.register_tokens is None else self.register_tokens[...]
        patches = self.patch_embed(pixels)
        x = with_class_token(patches, self.class_embedding[...], positions, registers)
        out = stack.run(self.blocks, x, taps=taps, context=context, depth=depth, remat=remat)
        tokens = constrain(self.norm_post(out.x), "batch")
        return TowerOutput(
            embedding=tokens[:, 0],
            pooled=tokens[:, 0],
            tokens=tokens,
            hidden=out.hidden,
            attention=out.attention,
            inserts=out.inserts,
            grid=grid,
            prefix=self.prefix,
        )


def _block(config: Dinov2Config, rngs: nnx.Rngs) -> Block:
    attention = Attention(config.width, config.heads, rngs=rngs)
    if config.mlp == "swiglu":
        mlp = SwiGlu(config.width, config.mlp_dim, rngs=rngs)
    else:
        mlp = Mlp(config.width, config.mlp_dim, act="gelu", rngs=rngs)
    return Block(config.width, attention, mlp, eps=config.eps, layer_scale=config.layer_scale)
