"""The AG-Adapter: image tokens attend to the tokens of an instruction.

That it sits in the layers of the visual encoder, links text to vision by a two-layer MLP and fuses
by cross-attention is from summaries of the paper (arXiv 2410.20109); shapes, place and
initialisation are this library's resolution. Letters: B batch, N image tokens, T text tokens,
D image width, W text width, H heads, E embedding width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.nn.adapters import AdapterParam, adapter_linear, adapter_norm
from perception_jax.nn.attention import AttentionOutput, multi_head
from perception_jax.nn.mlp import ACTIVATIONS
from perception_jax.nn.taps import LayerTap


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionFeatures:
    """Features of instructions on which adapters and presence head are conditioned.

    Attributes:
      states: text tokens after the text tower's final norm, the keys and values of the adapters.
      mask: True for tokens up to and including the first end token.
      embedding: unit vectors in the joint space, float32, the input of the presence head.
      strength: factor on the adapters' output, a float32 scalar; 1 is as trained.
    """

    states: Float[Array | np.ndarray, "B T W"]
    mask: Bool[Array | np.ndarray, "B T"]
    embedding: Float[Array | np.ndarray, "B E"]
    strength: Float[Array | np.ndarray, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of one AG-Adapter.

    Attributes:
      heads: None for one per 64 of the image width.
      gate: "none" starts from a zero output projection; "tanh" from a zero scalar gate instead (an
        ablation: it learns more slowly).
      connector: "mlp" (two layers) or "linear" between text and image width (an ablation).
      mlp_hidden: width of the hidden layer of the "mlp" connector; None for the image width.
      act: activation of the "mlp" connector, one of `nn.mlp.ACTIVATIONS`.
      eps: of the layer norm of the image tokens.

    Raises:
      ConfigError: a field of another type or out of range, or a hidden layer of a connector that
        has none.
    """

    heads: int | None = None
    gate: Literal["none", "tanh"] = "none"
    connector: Literal["mlp", "linear"] = "mlp"
    mlp_hidden: int | None = None
    act: str = "gelu"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            settings.check(getattr(self, name), allowed, f"adapter {name}")
        if self.connector == "linear" and self.mlp_hidden is not None:
            raise ConfigError(
                f'adapter mlp_hidden: expected None for the connector "linear", which has no '
                f"hidden layer, found {self.mlp_hidden}."
            )


_ALLOWED = {
    "heads": settings.Optional(settings.HEADS),
    "gate": settings.Choice(("none", "tanh")),
    "connector": settings.Choice(("mlp", "linear")),
    "mlp_hidden": settings.Optional(settings.WIDTH),
    "act": settings.Choice(tuple(ACTIVATIONS)),
    "eps": settings.EPS,
}


class AgAdapter(nnx.Module):
    """AG-Adapter: `h + strength * to_out(attention(norm(h), mlp(states)))`; first equal to `h`."""

    def __init__(self, config: AdapterConfig, width: int, text_width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.heads = config.heads or width // 64
        if self.heads < 1 or width % self.heads:
            raise ConfigError(
                f"adapter heads: expected a divisor of the image width {width}, found "
                f"{self.heads}; set `heads`."
            )
        self.norm = adapter_norm(width, eps=config.eps)
        hidden, gated = config.mlp_hidden or width, config.gate == "tanh"
        self.fc1 = adapter_linear(text_width, hidden, rngs=rngs)
        self.fc2 = adapter_linear(hidden, width, rngs=rngs) if config.connector == "mlp" else None
        self.to_q, self.to_k, self.to_v = (
            adapter_linear(width, width, bias=False, rngs=rngs) for _ in range(3)
        )
        self.to_out = adapter_linear(width, width, zero=not gated, rngs=rngs)
        self.gate = AdapterParam(jnp.zeros(())) if gated else None

    def __call__(
        self, h: Float[Array, "B N D"], instruction: InstructionFeatures
    ) -> Float[Array, "B N D"]:
        """Adds the output of cross-attention to the instruction to the image tokens."""
        added = self.to_out(self._attend(h, instruction).x)
        strength = instruction.strength
        if self.gate is not None:
            strength = strength * jnp.tanh(self.gate[...].astype(jnp.float32))
        return h + strength.astype(h.dtype) * added

    def attention(
        self, h: Float[Array, "B N D"], instruction: InstructionFeatures
    ) -> Float[Array, "B H N T"]:
        """Attention of each image token to each text token; 0 where the mask is False."""
        return self._attend(h, instruction, tap=LayerTap()).rows

    def _attend(
        self,
        h: Float[Array, "B N D"],
        instruction: InstructionFeatures,
        tap: LayerTap | None = None,
    ) -> AttentionOutput:
        text = self.fc1(instruction.states.astype(h.dtype))
        if self.fc2 is not None:
            text = self.fc2(ACTIVATIONS[self.config.act](text))
        return multi_head(
            self.to_q(self.norm(h)),
            self.to_k(text),
            self.to_v(text),
            heads=self.heads,
            mask=jnp.asarray(instruction.mask)[:, None, None],
            tap=tap,
        )
