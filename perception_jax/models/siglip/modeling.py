"""SigLIP: CLIP's two towers under a sigmoid loss (Zhai et al., arXiv 2303.15343).

The image tower has no class token and pools by attention; the text tower sees in both directions
and is read at its last position. Letters: B batch, H W image, T text tokens, E embedding width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from perception_jax.models.siglip.config import SiglipConfig, SiglipVisionConfig
from perception_jax.nn import position, stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import PatchEmbed
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.pooling import MapHead
from perception_jax.nn.taps import Taps
from perception_jax.nn.text_tower import TextTower
from perception_jax.nn.towers import TowerOutput
from perception_jax.nn.transformer import Block
from perception_jax.ops.losses import unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipOutput:
    """Attributes:
    image_embeds, text_embeds: unit vectors, float32.
    logits_per_image: `exp(logit_scale) * image_embeds @ text_embeds.T + logit_bias`, float32.
    """

    image_embeds: Float[Array, "B E"]
    text_embeds: Float[Array, "T E"]
    logits_per_image: Float[Array, "B T"]


class VisionTower(nnx.Module):
    """Pixels to tokens and a joint embedding."""

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

    def __call__(
        self,
        pixels: Float[Array, "B H W 3"],
        *,
        taps: Taps | None = None,
        depth: int | None = None,
        remat: bool = False,
    ) -> TowerOutput:
        """Encodes normalised pixels of any size.

        Returns:
          `tokens` after the final norm (the last hidden state of Hugging Face), `pooled` and
          `embedding` the output of the attention pooling.
        """
        grid = self.patch_embed.grid(pixels)
        x = self.patch_embed(pixels)
        positions = position.resample(self.position_embedding[...], grid, prefix=0, antialias=True)
        x = x + positions.astype(x.dtype)
        out = stack.run(self.blocks, x, taps=taps, depth=depth, remat=remat)
        tokens = self.norm_post(out.x)
        pooled = self.head(tokens)
        return TowerOutput(
            embedding=pooled,
            pooled=pooled,
            tokens=tokens,
            hidden=out.hidden,
            attention=out.attention,
        )


class Siglip(nnx.Module):
    """Both towers, the learned temperature (stored as a logarithm) and the logit bias."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.log(jnp.asarray(10.0, jnp.float32)))
        self.logit_bias = nnx.Param(jnp.asarray(-10.0, jnp.float32))

    def __call__(self, pixels: Float[Array, "B H W 3"], ids: Int[Array, "T K"]) -> SiglipOutput:
        """Compares every image with every text."""
        image = unit(self.vision(pixels).embedding)
        text = unit(self.text(ids, dtype=pixels.dtype).embedding)
        scale = jnp.exp(self.logit_scale[...].astype(jnp.float32))
        logits = scale * image @ text.T + self.logit_bias[...].astype(jnp.float32)
        return SiglipOutput(image_embeds=image, text_embeds=text, logits_per_image=logits)
