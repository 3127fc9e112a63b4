"""A stack of equal blocks as one module with stacked leaves, run by `lax.scan`.

A prefix of a stack is a slice of its leaves, so computing only the layers needed costs nothing.
Tapped layers are grouped into runs of equal taps: each run is one scan that records just what was
asked for. Letters: L layers, B batch, T tokens, D width, N heads, Q query rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from perception_jax.nn.attention import Mask
from perception_jax.nn.rope import Rope
from perception_jax.nn.taps import LayerTap, Taps, layer_indices

BlockModule = TypeVar("BlockModule", bound=nnx.Module)


class Block(Protocol):
    """What a stack runs."""

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask | None,
        rope: Rope | None,
        context: Any,
        tap: LayerTap | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B N Q T"] | None]:
        """The block's output and, if tapped, its attention rows.

        `context` is whatever the model hands to all its blocks (e.g. instruction tokens).
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class StackOutput:
    """Attributes:
    x: output of the last block that ran.
    hidden: recorded hidden states, in layer order; None if none was asked for.
    attention: recorded attention rows, in layer order; None if none was asked for.
    """

    x: Float[Array, "B T D"]
    hidden: Float[Array, "L B T D"] | None = None
    attention: Float[Array, "L B N Q T"] | None = None


def init(make: Callable[[nnx.Rngs], BlockModule], depth: int, *, rngs: nnx.Rngs) -> BlockModule:
    """`depth` blocks as one module whose leaves carry a leading layer axis."""
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def residual_gain(depth: int) -> float:
    """What CLIP multiplies the initial weights by that end its 2 × `depth` residual branches.

    The sum of all branches then starts as large as their input (GPT-2, §2.3; in OpenAI's CLIP code
    `proj_std`).
    """
    return (2 * depth) ** -0.5


def depth_of(blocks: nnx.Module) -> int:
    """Number of layers in a stacked module."""
    return jax.tree.leaves(blocks)[0].shape[0]


def part(blocks: BlockModule, start: int, stop: int) -> BlockModule:
    """Layers `start` to `stop` (exclusive) of a stacked module."""
    return jax.tree.map(lambda leaf: leaf[start:stop], blocks)


def run(
    blocks: nnx.Module,
    x: Float[Array, "B T D"],
    *,
    mask: Mask | None = None,
    rope: Rope | None = None,
    context: Any = None,
    taps: Taps | None = None,
    depth: int | None = None,
    remat: bool = False,
) -> StackOutput:
    """Runs the first `depth` blocks (all by default).

    Args:
      blocks: a stacked module from `init`.
      x: input of the first block.
      mask: True where a query may look at a key.
      rope: rotary positions of the tokens.
      context: handed to every block unchanged.
      taps: what to record; see `nn.taps`.
      depth: how many blocks to run; taps count within these.
      remat: recompute activations in the backward pass instead of keeping them.
    """
    taps = taps or Taps()
    depth = depth_of(blocks) if depth is None else depth
    attention = layer_indices(taps.attention, depth)
    wanted = layer_indices(taps.hidden, depth + 1)
    hidden = [x[None]] if 0 in wanted else []
    rows = []

    def step(x, layer):
        block, probe, kind = layer
        tap = LayerTap(rows=taps.rows, probe=probe) if kind.attention else None
        y, recorded = block(x, mask=mask, rope=rope, context=context, tap=tap)
        return y, (recorded, y if kind.hidden else None)

    done = 0
    for kind, start, stop in _runs(depth, attention, wanted):
        probes = None
        if kind.attention and taps.probes is not None:
            probes = taps.probes[done : done + stop - start]
            done += stop - start

        def body(x, layer, kind=kind):
            return step(x, (*layer, kind))

        body = jax.checkpoint(body, prevent_cse=False) if remat else body
        x, (recorded, states) = jax.lax.scan(body, x, (part(blocks, start, stop), probes))
        rows += [recorded] if kind.attention else []
        hidden += [states] if kind.hidden else []
    return StackOutput(
        x=x,
        hidden=jnp.concatenate(hidden) if hidden else None,
        attention=jnp.concatenate(rows) if rows else None,
    )


@dataclasses.dataclass(frozen=True)
class _Kind:
    attention: bool
    hidden: bool


def _runs(depth: int, attention: tuple[int, ...], hidden: tuple[int, ...]):
    """Neighbouring layers with the same taps, as (kind, start, stop)."""
    kinds = [_Kind(layer in attention, layer + 1 in hidden) for layer in range(depth)]
    start = 0
    for kind, group in itertools.groupby(kinds):
        stop = start + len(list(group))
        yield kind, start, stop
        start = stop
