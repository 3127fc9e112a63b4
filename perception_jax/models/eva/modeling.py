"""EVA-CLIP (Sun et al., arXiv 2303.15389) around the image towers that timm calls `Eva`.

EVA-02 is Fang et al., arXiv 2303.11331. The text tower is CLIP's with exact GELU. Letters: B batch,
H W image, T text tokens, D width, E embedding width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.models.eva.config import EvaConfig, EvaVisionConfig
from perception_jax.nn import position, stack
from perception_jax.nn.attention import Attention
from perception_jax.nn.linear import Linear, PatchEmbed
from perception_jax.nn.mlp import Mlp, SwiGlu
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.rope import Rope, axial
from perception_jax.nn.taps import Taps, refuse_pool
from perception_jax.nn.text_tower import TextTower
from perception_jax.nn.towers import TowerOutput, TwoTowers, with_class_token
from perception_jax.nn.transformer import Block
from perception_jax.ops.sharding import constrain


class VisionTower(nnx.Module):
    """Pixels to tokens and a joint embedding."""

    prefix = 1
    normed_tokens = True

    def __init__(self, config: EvaVisionConfig, embed_dim: int, *, rngs: nnx.Rngs):
        width = config.width
        self.rotary = config.kind == "eva02_rope"
        self.reference_grid = config.reference_grid
        self.head_width = width // config.heads
        self.patch_embed = PatchEmbed(config.patch_size, width, bias=True, rngs=rngs)
        self.class_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.position_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.tokens, width))
        )
        self.blocks = stack.init(functools.partial(_block, config), config.depth, rngs=rngs)
        self.norm_post = LayerNorm(width, eps=config.eps)
        self.projection = Linear(width, embed_dim, rngs=rngs)

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
        """Encodes normalised pixels of any size.

        Returns:
          `tokens` after the final norm, `pooled` the class token among them.
        """
        refuse_pool(taps)
        pixels = constrain(pixels, "batch")
        grid = self.patch_embed.grid(pixels)
        positions = self.positions(grid)
        x = with_class_token(self.patch_embed(pixels), self.class_embedding[...], positions)
        out = stack.run(
            self.blocks,
            x,
            rope=self.rope(grid),
            taps=taps,
            context=context,
            depth=depth,
            remat=remat,
        )
        tokens = constrain(self.norm_post(out.x), "batch")
        return TowerOutput(
            embedding=constrain(self.projection(tokens[:, 0]), "batch"),
            pooled=tokens[:, 0],
            tokens=tokens,
            hidden=out.hidden,
            attention=out.attention,
            inserts=out.inserts,
            grid=grid,
            prefix=self.prefix,
        )

    def rope(self, grid: tuple[int, int]) -> Rope | None:
        """Rotary positions for a grid of patches; None for the towers without them."""
        if not self.rotary:
            return None
        return axial(grid, self.head_width, reference=self.reference_grid, prefix=self.prefix)


class Eva(TwoTowers):
    """Both towers and the learned temperature (stored as a logarithm)."""

    def __init__(self, config: EvaConfig, *, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, config.embed_dim, rngs=rngs)
        self.text = TextTower(config.text, config.embed_dim, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592, jnp.float32))


def _block(config: EvaVisionConfig, rngs: nnx.Rngs) -> Block:
    width, eps = config.width, config.eps
    inner = eps if config.kind == "eva02_rope" else None
    attention = Attention(width, config.heads, key_bias=False, inner_eps=inner, rngs=rngs)
    if config.kind == "eva02_rope":
        mlp = SwiGlu(width, config.mlp_dim, inner_eps=eps, rngs=rngs)
    else:
        mlp = Mlp(width, config.mlp_dim, act="gelu", rngs=rngs)
    norm = "post" if config.kind == "eva02_post_norm" else "pre"
    return Block(width, attention, mlp, eps=eps, norm=norm)
