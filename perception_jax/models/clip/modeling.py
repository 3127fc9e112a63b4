"""CLIP: two transformers that meet in one embedding space (Radford et al., arXiv 2103.00020).

The image tower is a pre-norm ViT with a class token and a norm before the blocks; the text tower
is causal and pooled at the end token. Serves OpenAI's, MetaCLIP's, DFN's and LAION's weights.
Letters: B batch, H W image, P patches, T text tokens, D width, E embedding width.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.nn import position, stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import Linear, PatchEmbed
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.taps import Taps
from perception_jax.nn.text_tower import TextTower
from perception_jax.nn.towers import TowerOutput
from perception_jax.nn.transformer import Block
from perception_jax.ops.losses import unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipOutput:
    """Attributes:
    image_embeds, text_embeds: unit vectors, float32.
    logits_per_image: `exp(logit_scale) * image_embeds @ text_embeds.T`, float32.
    """

    image_embeds: Float[Array, "B E"]
    text_embeds: Float[Array, "T E"]
    logits_per_image: Float[Array, "B T"]


class VisionTower(nnx.Module):
    """Pixels to tokens and a joint embedding."""

    def __init__(self, config: VisionConfig, embed_dim: int, *, rngs: nnx.Rngs):
        width = config.width
        scale = width**-0.5
        self.patch_embed = PatchEmbed(config.patch_size, width, bias=False, rngs=rngs)
        self.class_embedding = nnx.Param(scale * jax.random.normal(rngs.params(), (width,)))
        self.position_embedding = nnx.Param(
            scale * jax.random.normal(rngs.params(), (config.tokens, width))
        )
        self.norm_pre = LayerNorm(width, eps=config.eps)
        self.blocks = stack.init(functools.partial(_block, config), config.depth, rngs=rngs)
        self.norm_post = LayerNorm(width, eps=config.eps)
        self.projection = Linear(width, embed_dim, bias=False, rngs=rngs)

    def __call__(
        self,
        pixels: Float[Array, "B H W 3"],
        *,
        taps: Taps | None = None,
        depth: int | None = None,
        remat: bool = False,
    ) -> TowerOutput:
        """Encodes normalised pixels.

        Args:
          pixels: normalised with the checkpoint's mean and standard deviation, of any size; for
            another size than the trained one the positions are resized as open_clip does.
          taps: attention rows and hidden states to record.
          depth: run only the first `depth` blocks (pooled and embedding then come from there).
          remat: recompute activations in the backward pass.

        Returns:
          `tokens` without the final norm (the last hidden state of Hugging Face), `pooled` the
          class token after `norm_post`.
        """
        grid = self.patch_embed.grid(pixels)
        x = self.patch_embed(pixels)
        start = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[2]))
        x = jnp.concatenate([start.astype(x.dtype), x], axis=1)
        positions = position.resample(self.position_embedding[...], grid, prefix=1, antialias=True)
        x = self.norm_pre(x + positions.astype(x.dtype))
        out = stack.run(self.blocks, x, taps=taps, depth=depth, remat=remat)
        pooled = self.norm_post(out.x[:, 0])
        return TowerOutput(
            embedding=self.projection(pooled),
            pooled=pooled,
            tokens=out.x,
            hidden=out.hidden,
            attention=out.attention,
        )


class Clip(nnx.Module):
    """Both towers and the learned temperature (stored as a logarithm)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, config.embed_dim, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init, jnp.float32))

    def __call__(self, pixels: Float[Array, "B H W 3"], ids: Int[Array, "T K"]) -> ClipOutput:
        """Compares every image with every text."""
        image = unit(self.vision(pixels).embedding)
        text = unit(self.text(ids, dtype=pixels.dtype).embedding)
        scale = jnp.exp(self.logit_scale[...].astype(jnp.float32))
        return ClipOutput(
            image_embeds=image, text_embeds=text, logits_per_image=scale * image @ text.T
        )


def _block(config: VisionConfig, rngs: nnx.Rngs) -> Block:
    attention = Attention(config.width, config.heads, rngs=rngs)
    mlp = Mlp(config.width, config.mlp_dim, act=config.act, rngs=rngs)
    return Block(config.width, attention, mlp, eps=config.eps)
