"""The vision transformer: common base of the image towers of CLIP, SigLIP, EVA and DINOv2.

Letters: B batch, H W image, N position rows, P patches, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.nn import position, stack
from perception_jax.nn.linear import PatchEmbed
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.rope import Rope
from perception_jax.nn.taps import Taps, refuse_pool
from perception_jax.nn.towers import TowerOutput, with_class_token
from perception_jax.ops.sharding import constrain


class VisionTransformer(nnx.Module):
    """Pixels to tokens: patches, class token and registers, positions, blocks, a final norm.

    A tower of an architecture adds what reads its tokens, and says so in `read`.

    Attributes:
      prefix: tokens before the patches: class token and registers.
      normed_tokens: whether `TowerOutput.tokens` are behind the final norm.

    Args:
      block: makes one block.
      depth: how many there are.
      positions: rows of the position table: class token, if there is one, and patches.
      eps: of the norms before and behind the blocks.
      patch_bias: whether the patch embedding has a bias.
      class_scale: standard deviation of the initial class token; None has no class token.
      position_scale: standard deviation of the initial positions.
      registers: extra tokens behind the class token; they have no position.
      norm_pre: whether there is a norm before the blocks.
      antialias, offset: how positions are resized; see `nn.position.resample`.
    """

    normed_tokens = True

    def __init__(
        self,
        block: Callable[[nnx.Rngs], nnx.Module],
        *,
        width: int,
        depth: int,
        patch_size: int,
        positions: int,
        eps: float,
        patch_bias: bool = True,
        class_scale: float | None = 0.02,
        position_scale: float = 0.02,
        registers: int = 0,
        norm_pre: bool = False,
        antialias: bool = True,
        offset: float = 0.0,
        rngs: nnx.Rngs,
    ):
        def normal(scale: float, *shape: int) -> nnx.Param:
            return nnx.Param(scale * jax.random.normal(rngs.params(), shape))

        self.prefix = int(class_scale is not None) + registers
        self.position_antialias = antialias
        self.position_offset = offset
        self.patch_embed = PatchEmbed(patch_size, width, bias=patch_bias, rngs=rngs)
        self.class_embedding = None if class_scale is None else normal(class_scale, width)
        self.register_tokens = normal(0.02, registers, width) if registers else None
        self.position_embedding = normal(position_scale, positions, width)
        self.norm_pre = LayerNorm(width, eps=eps) if norm_pre else None
        self.blocks = stack.init(block, depth, rngs=rngs)
        self.norm_post = LayerNorm(width, eps=eps)

    def positions(self, grid: tuple[int, int]) -> Float[Array, "N D"]:
        """Returns the position embeddings of a grid of patches, resized from the stored table."""
        return position.resample(
            self.position_embedding[...],
            grid,
            prefix=0 if self.class_embedding is None else 1,
            antialias=self.position_antialias,
            offset=self.position_offset,
        )

    def rope(self, grid: tuple[int, int]) -> Rope | None:
        """Rotary positions for a grid of patches; None for towers without them."""
        return None

    def embed(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B T D"]:
        """The input of the first block."""
        x = self.patch_embed(pixels)
        positions = self.positions(self.patch_embed.grid(pixels))
        if self.class_embedding is None:
            x = x + positions.astype(x.dtype)
        else:
            registers = None if self.register_tokens is None else self.register_tokens[...]
            x = with_class_token(x, self.class_embedding[...], positions, registers)
        return x if self.norm_pre is None else self.norm_pre(x)

    def read(self, x: Float[Array, "B T D"], taps: Taps | None) -> TowerOutput:
        """Tokens, pooled token and embedding from the output of the last block.

        Here the class token behind the final norm is pooled token and embedding.
        """
        refuse_pool(taps)
        tokens = constrain(self.norm_post(x), "batch")
        return TowerOutput(embedding=tokens[:, 0], pooled=tokens[:, 0], tokens=tokens)

    def __call__(
        self,
        pixels: Float[Array, "B H W 3"],
        *,
        taps: Taps | None = None,
        context: stack.Context | None = None,
        depth: int | None = None,
        remat: stack.Remat = False,
    ) -> TowerOutput:
        """Encodes normalised pixels.

        Args:
          pixels: normalised with the checkpoint's mean and standard deviation, of any size; for
            another size than the trained one the positions are resized.
          taps: attention rows and hidden states to record; these have no final norm.
          context: for inserts around the blocks' steps; see `nn.stack.Inserted`.
          depth: run only the first `depth` blocks (pooled and embedding then come from there).
          remat: what the backward pass recomputes; see `nn.stack.REMAT`.

        Raises:
          ConfigError: images smaller than a patch, or taps that the tower cannot record.
        """
        pixels = constrain(pixels, "batch")
        grid = self.patch_embed.grid(pixels)
        x = self.embed(pixels)
        out = stack.run(
            self.blocks,
            x,
            rope=self.rope(grid),
            taps=taps,
            context=context,
            depth=depth,
            remat=remat,
        )
        return dataclasses.replace(
            self.read(out.x, taps),
            hidden=out.hidden,
            attention=out.attention,
            inserts=out.inserts,
            grid=grid,
            prefix=self.prefix,
        )
