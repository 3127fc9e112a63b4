"""SigLIP: CLIP's two towers under a sigmoid loss (Zhai et al., arXiv 2303.15343).

The image tower has no class token and pools by attention; the text tower sees in both directions
and is read at its last position. Letters: B batch, H W image, T text tokens, E embedding width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.models.siglip.config import SiglipConfig, SiglipVisionConfig
from perception_jax.nn import position, stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import PatchEmbed
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.pooling import MapHead
from perception_jax.nn.taps import Taps
from perception_jax.nn.text_tower import TextTower
from perception_jax.nn.towers import TowerOutput, TwoTowers
from perception_jax.nn.transformer import Block
from perception_jax.ops.sharding import constrain


class VisionTower(nnx.Module):
    """Pixels to tokens and a joint embedding."""

    prefix = 0
    normed_tokens = True

    def __init__(self, config: SiglipVisionConfig, *, rngs: nnx.Rngs):
        width = config.width

        def block(rngs: nnx.Rngs) -> Block:
            attention = Attention(width, config.heads, rngs=rngs)
            mlp = Mlp(width, config.mlp_dim, act=config.act, rngs=rngs)
            return Block(width, attention, mlp, eps=config.eps)

        self.patch_embed = PatchEmbed(config.patch_size, width, bias=True, rngs=rngs)
        self.position_embedding = nnx.Param(
            width**-0.5 * jax.random.normal(rngs.params(), (config.tokens, width))
        )
        self.blocks = stack.init(block, config.depth, rngs=rngs)
        self.norm_post = LayerNorm(width, eps=config.eps)
        self.head = MapHead(
            width, config.heads, config.mlp_dim, act=config.act, eps=config.eps, rngs=rngs
        )

    def positions(self, grid: tuple[int, int]) -> Float[Array, "N D"]:
        """What is added to the tokens of a grid of patches, resized as open_clip does."""
        return position.resample(self.position_embedding[...], grid, prefix=0, antialias=True)

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

        Returns:
          `tokens` after the final norm (the last hidden state of Hugging Face), `pooled` and
          `embedding` the output of the attention pooling.
        """
        pixels = constrain(pixels, "batch")
        grid = self.patch_embed.grid(pixels)
        x = self.patch_embed(pixels)
        positions = self.positions(grid)
        x = x + positions.astype(x.dtype)
        out = stack.run(self.blocks, x, taps=taps, context=context, depth=depth, remat=remat)
        tokens = constrain(self.norm_post(out.x), "batch")
        pooled, pool_attention = self.head(tokens, tap=None if taps is None else taps.of_pool)
        return TowerOutput(
            embedding=pooled,
            pooled=pooled,
            tokens=tokens,
            hidden=out.hidden,
            attention=out.attention,
            inserts=out.inserts,
            pool_attention=pool_attention,
            grid=grid,
            prefix=self.prefix,
        )


class Siglip(TwoTowers):
    """Both towers, the learned temperature (stored as a logarithm) and the logit bias."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.asarray(10.0, jnp.float32)))
        self.logit_bias = nnx.Param(jnp.asarray(-10.0, jnp.float32))
