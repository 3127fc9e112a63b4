"""Inputs and outputs of the layers of a stack, and the protocols of blocks and inserts.

Letters: B batch, T tokens, D width, C width of the memory, N heads, Q query rows, K keys, A heads
of an insert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jaxtyping import Array, Float, Int

from perception_jax.nn.attention import AnyMask, LayerCache
from perception_jax.nn.rope import Rope
from perception_jax.nn.taps import LayerTap


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """The inputs of a block's steps besides the tokens.

    Attributes:
      index: number of the layer in its stack.
      mask, rope: which keys a token may attend to, and rotary positions.
      memory: tokens for cross-attention.
      memory_mask: which of these a token may attend to.
      tap, cross_tap: what to record of the self- and the cross-attention.
      cache: keys and values of earlier tokens.
      key: random key of this layer alone, for dropout; None drops nothing.
      drop_path: probability that a residual branch of an example is dropped.
      inputs: this layer's part of the stack's `inputs`.
      state: what travels from layer to layer besides the tokens.
    """

    index: Int[Array, ""] | int = 0
    mask: AnyMask = None
    rope: Rope | None = None
    memory: Float[Array, "B K C"] | None = None
    memory_mask: AnyMask = None
    tap: LayerTap | None = None
    cross_tap: LayerTap | None = None
    cache: LayerCache | None = None
    key: Array | None = None
    drop_path: float | Float[Array, ""] = 0.0
    inputs: Any = None
    state: Any = None

    def key_of(self, site: int) -> Array | None:
        """A key for one of several places in the layer that drop something."""
        return None if self.key is None else jax.random.fold_in(self.key, site)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOutput:
    """The output of a step of a block.

    Attributes:
      x: the tokens.
      attention, cross: rows of the self- and the cross-attention, if tapped.
      cache: with the new keys and values; None leaves it as it was.
      state: for the next step; None leaves it as it was.
      outputs: what the stack returns of this layer besides the tokens; None is nothing.
    """

    x: Float[Array, "B T D"]
    attention: Float[Array, "B N Q K"] | None = None
    cross: Float[Array, "B _ Q _"] | None = None
    cache: LayerCache | None = None
    state: Any = None
    outputs: Any = None


Step = Callable[[Array, Layer], StepOutput]
"""A sub-layer with its residual."""


class StackBlock(Protocol):
    """Protocol of a stack's block, e.g. `nn.transformer.Block`: it has steps.

    Attributes:
      attends_memory: whether one of the steps is cross-attention.
    """

    attends_memory: bool

    @property
    def steps(self) -> Sequence[Step]:
        """The sub-layers, in order."""


class Insert(Protocol):
    """Protocol of a layer placed before, between or after the steps of a block."""

    def __call__(self, x: Float[Array, "B T D"], given: Any) -> Float[Array, "B T D"]:
        """Maps tokens to tokens, conditioned on `Context.given`."""

    def attention(self, x: Float[Array, "B T D"], given: Any) -> Float[Array, "B A T K"]:
        """Returns the attention of each token to each token of the condition."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The condition of the inserts of a stack.

    Attributes:
      given: for `Insert`, a pytree.
      repeats: how many rows of `given` belong to each example of the batch, one after the other
        (static). Above 1, layers before the first insert are computed once for each example, and
        the batch grows there; see `nn.stack`.
    """

    given: Any
    repeats: int = dataclasses.field(default=1, metadata={"static": True})
