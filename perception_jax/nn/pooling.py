"""Attention pooling (SigLIP's MAP head). Letters: B batch, T tokens, D width, N heads."""

from __future__ import annotations

import jax
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.nn.attention import multi_head
from perception_jax.nn.linear import Linear
from perception_jax.nn.mlp import Mlp
from perception_jax.nn.norms import LayerNorm
from perception_jax.nn.taps import LayerTap, PoolTap
from perception_jax.ops.sharding import constrain


class MapHead(nnx.Module):
    """One learned query attends to all tokens; an MLP with its own residual follows
    (Zhai et al., arXiv 2106.04560, §2.1)."""

    def __init__(
        self, width: int, heads: int, mlp_dim: int, *, act: str, eps: float, rngs: nnx.Rngs
    ):
        self.heads = heads
        self.probe = nnx.Param(width**-0.5 * jax.random.normal(rngs.params(), (width,)))
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)
        self.norm = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, mlp_dim, act=act, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], *, tap: PoolTap | None = None
    ) -> tuple[Float[Array, "B D"], Float[Array, "B N T"] | None]:
        """The pooled token and, if tapped, the query's attention (float32)."""
        query = self.q_proj(self.probe[...].astype(x.dtype)[None, None])
        if tap is not None:
            probe = None if tap.probe is None else tap.probe[:, :, None]
            tap = LayerTap(probe=probe)
        out = multi_head(query, self.k_proj(x), self.v_proj(x), heads=self.heads, tap=tap)
        y = constrain(self.out_proj(constrain(out.x[:, 0], "batch")), "batch")
        rows = None if out.rows is None else out.rows[:, :, 0]
        return constrain(y + self.mlp(self.norm(y)), "batch"), rows
