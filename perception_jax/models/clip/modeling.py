"""CLIP: two transformers that meet in one embedding space (Radford et al., arXiv 2103.00020).

The image tower is a pre-norm ViT with a class token and a norm before the blocks; the text tower
is causal and pooled at the end token. Serves OpenAI's, MetaCLIP's, DFN's and LAION's weights.
Letters: B batch, H W image, P patches, T text tokens, D width, E embedding width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.models.clip.config import ClipConfig, VisionConfig
from perception_jax.nn import position, stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import Linear, PatchEmbed
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.taps import Taps, refuse_pool
from perception_jax.nn.text_tower import TextTower
from perception_jax.nn.towers import TowerOutput, TwoTowers, with_class_token
from perception_jax.nn.transformer import Block
from perception_jax.ops.sharding import constrain


class VisionTower(nnx.Module):
    """Pixels to tokens and a joint embedding."""

    prefix = 1
    normed_tokens = False

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

    def positions(self, grid: tuple[int, int]) -> Float[Array, "N D"]:
        """What is added to the tokens of a grid of patches, resized as open_clip does."""
        return position.resample(self.position_embedding[...], grid, prefix=1, antialias=True)

    def __call__(
        self,
        pixels: Float[Array, "B H W 3"],
        *,
        taps: Taps | None = None,
        context: stack.Context | None = None,
        depth: int | None = None,
        remat: bool = False,
    ) -> TowerOutput:
        """Encodes normalised pixels.

        Args:
          pixels: normalised with the checkpoint's mean and standard deviation, of any size; for
            another size than the trained one the positions are resized as open_clip does.
          taps: attention rows and hidden states to record.
          context: for inserts between the blocks' steps; see `nn.stack.Inserted`.
          depth: run only the first `depth` blocks (pooled and embedding then come from there).
          remat: recompute activations in the backward pass.

        Returns:
          `tokens` without the final norm (the last hidden state of Hugging Face), `pooled` the
          class token after `norm_post`.
        """
        refuse_pool(taps)
        pixels = constrain(pixels, "batch")
        grid = self.patch_embed.grid(pixels)
        positions = self.positions(grid)
        x = with_class_token(self.patch_embed(pixels), self.class_embedding[...], positions)
        x = self.norm_pre(x)
        out = stack.run(self.blocks, x, taps=taps, context=context, depth=depth, remat=remat)
        pooled = constrain(self.norm_post(out.x[:, 0]), "batch")
        return TowerOutput(
            embedding=constrain(self.projection(pooled), "batch"),
            pooled=pooled,
            tokens=out.x,
            hidden=out.hidden,
            attention=out.attention,
            inserts=out.inserts,
            grid=grid,
            prefix=self.prefix,
        )


class Clip(TwoTowers):
    """Both towers and the learned temperature (stored as a logarithm)."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, config.embed_dim, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init, jnp.float32))


def _block(config: VisionConfig, rngs: nnx.Rngs) -> Block:
    gain = stack.residual_gain(config.depth)
    attention = Attention(config.width, config.heads, gain=gain, rngs=rngs)
    mlp = Mlp(config.width, config.mlp_dim, act=config.act, gain=gain, rngs=rngs)
    return Block(config.width, attention, mlp, eps=config.eps)
