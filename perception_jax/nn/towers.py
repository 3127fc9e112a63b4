"""What every image or text tower returns. Letters: B batch, T tokens, D width, L layers, N heads,
Q query rows, E embedding width."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerOutput:
    """Output of one tower.

    Attributes:
      embedding: in the joint space, not normalised; None for a tower without one.
      pooled: the pooled token after the final norm, before any projection.
      tokens: all tokens; see the tower for whether the final norm has been applied.
      hidden: hidden states asked for by `Taps.hidden`, in layer order.
      attention: attention rows asked for by `Taps.attention`, in layer order.
    """

    embedding: Float[Array, "B E"] | None
    pooled: Float[Array, "B D"]
    tokens: Float[Array, "B T D"]
    hidden: Float[Array, "L B T D"] | None = None
    attention: Float[Array, "L B N Q T"] | None = None
