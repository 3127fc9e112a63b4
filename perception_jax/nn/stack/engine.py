"""A scan over layers of repeating kinds, with inputs and outputs per layer.

Layers of one kind run the same program. Runs of a repeating pattern of kinds are one `lax.scan`
each, so that a model with many equal layers compiles as fast as one with few. What the layers
compute is the caller's `body`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from perception_jax.errors import ConfigError
from perception_jax.nn.stack.stacked import part

_LONGEST_PATTERN = 4

Remat = bool | str
"""A name of `REMAT`; True is "full", False "none"."""

BLOCK_INPUT = "block input"
"""Name, by `jax.ad_checkpoint.checkpoint_name`, of what "offload" keeps: the tokens that enter a
block."""

_POLICIES = jax.checkpoint_policies
REMAT: Mapping[str, Callable | None] = MappingProxyType(
    {
        "none": _POLICIES.everything_saveable,
        "dots": _POLICIES.dots_saveable,
        "dots_no_batch": _POLICIES.dots_with_no_batch_dims_saveable,
        "full": None,
        "offload": _POLICIES.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[BLOCK_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
)
"""What is kept for the backward pass; what is not kept is computed again.

- "none": everything is kept.
- "dots": all matrix products.
- "dots_no_batch": those with weights, not those of attention.
- "full": the input of each block alone.
- "offload": the same, in the host's memory: copied there while the next blocks run, and back in the
  backward pass. On CPUs, whose memory is the host's, it is "full".
"""

Kind = Hashable
"""The kind of a layer: layers of equal kinds run the same program."""


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """Arrays with a leading axis over the layers that have them.

    Attributes:
      stacked: a pytree, or a `Separate` stack.
      has: whether layers of a kind have them.
    """

    stacked: Any
    has: Callable[[Kind], bool] = lambda kind: True


@dataclasses.dataclass(frozen=True)
class LayerSlice:
    """One layer of a scan.

    Attributes:
      kind: of the layer.
      index: number of the layer; traced inside a scan.
      per_layer: its part of each `LayerInputs` by name; None of those that it does not have.
    """

    kind: Kind
    index: Int[Array, ""] | int
    per_layer: Mapping[str, Any]


Body = Callable[[Any, LayerSlice], tuple[Any, dict[str, Any]]]
"""Function from carry and layer to carry and recorded values by name."""


def scan(
    body: Body,
    carry: Any,
    kinds: Sequence[Kind],
    per_layer: Mapping[str, LayerInputs],
    *,
    start: int = 0,
    remat: Remat = False,
    unrolled: Callable[[Kind], bool] = lambda kind: False,
) -> tuple[Any, dict[str, Any]]:
    """Runs the layers `start` to `len(kinds)`.

    Args:
      body: one layer; layers of equal kinds record equal structures.
      kinds: of all layers from 0 on, those before `start` too, since `per_layer` counts from 0.
      per_layer: inputs that differ between layers, by name.
      remat: what is kept for the backward pass.
      unrolled: kinds whose layers stand alone without a loop, e.g. where the carry's shape changes.

    Returns:
      The carry, and under each name what the layers recorded, stacked in layer order.

    Raises:
      ConfigError: an unknown name for `remat`.
    """
    recorded: dict[str, list[Any]] = {}
    for pattern, first, stop in _runs(kinds, start, unrolled):
        repeats = (stop - first) // len(pattern)
        index = jnp.arange(first, stop).reshape(repeats, len(pattern))
        layers = {
            name: _take(inputs, kinds, pattern, first, repeats)
            for name, inputs in per_layer.items()
        }
        one = _checkpointed(_body(body, pattern, per_layer), remat)
        if unrolled(pattern[0]):
            carry, found = one(carry, jax.tree.map(lambda leaf: leaf[0], (index, layers)))
            found = jax.tree.map(lambda leaf: leaf[None], found)
        else:
            carry, found = jax.lax.scan(one, carry, (index, layers))
        for name, of_pattern in found.items():
            recorded.setdefault(name, []).append(_in_layer_order(of_pattern))
    return carry, {name: _concatenated(parts) for name, parts in recorded.items()}


def _body(body: Body, pattern: Sequence[Kind], per_layer: Mapping[str, LayerInputs]) -> Callable:
    """Runs one repeat of a pattern of layers."""

    def step(carry: Any, xs: tuple[Any, dict[str, Any]]) -> tuple[Any, dict[str, list[Any]]]:
        index, layers = xs
        recorded: dict[str, list[Any]] = {}
        taken = dict.fromkeys(per_layer, 0)
        for j, kind in enumerate(pattern):
            own = {}
            for name, inputs in per_layer.items():
                has = layers[name] is not None and inputs.has(kind)
                own[name] = None
                if has:
                    alone = _count(inputs, pattern) == 1
                    own[name] = layers[name] if alone else _at(layers[name], taken[name])
                taken[name] += has
            carry, found = body(carry, LayerSlice(kind, index[j], own))
            for name, value in found.items():
                recorded.setdefault(name, []).append(value)
        return carry, recorded

    return step


def _take(
    inputs: LayerInputs, kinds: Sequence[Kind], pattern: Sequence[Kind], first: int, repeats: int
) -> Any:
    """Of a run, with the axes [repeats, layers of the pattern that have it] in front.

    Where one layer has it there is no second axis: on CPU, XLA would copy all of a stack that is
    reshaped for a loop without moving an element.
    """
    count = _count(inputs, pattern)
    if inputs.stacked is None or count == 0:
        return None
    before = sum(map(inputs.has, kinds[:first]))
    chosen = part(inputs.stacked, before, before + repeats * count)
    if count == 1:
        return chosen
    return jax.tree.map(lambda leaf: leaf.reshape(repeats, count, *leaf.shape[1:]), chosen)


def _count(inputs: LayerInputs, pattern: Sequence[Kind]) -> int:
    """Layers of a pattern that have it."""
    return sum(map(inputs.has, pattern))


def _at(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _in_layer_order(of_pattern: list[Any]) -> Any:
    """Reorders arrays per layer of a pattern [repeats, ...] to [layers, ...]."""

    def join(*leaves: Array) -> Array:
        stacked = jnp.stack(leaves, axis=1)
        return stacked.reshape(-1, *stacked.shape[2:])

    return jax.tree.map(join, *of_pattern)


def _concatenated(parts: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _checkpointed(body: Callable, remat: Remat) -> Callable:
    name = {True: "full", False: "none"}.get(remat, remat)
    if name not in REMAT:
        raise ConfigError(f"remat: expected a bool or one of {', '.join(REMAT)}, found {remat!r}.")
    if name == "none":
        return body
    return jax.checkpoint(body, prevent_cse=False, policy=REMAT[name])


def _runs(
    kinds: Sequence[Kind], start: int, unrolled: Callable[[Kind], bool]
) -> Iterator[tuple[tuple[Kind, ...], int, int]]:
    """Runs of a repeating pattern, as (pattern, first, stop): the longest first, then the next."""
    while start < len(kinds):
        pattern, stop = (kinds[start],), start + 1
        if not unrolled(kinds[start]):
            pattern, stop = max(
                (_repeated(kinds, start, length) for length in range(1, _LONGEST_PATTERN + 1)),
                key=lambda found: (found[1], -len(found[0])),
            )
        yield pattern, start, stop
        start = stop


def _repeated(kinds: Sequence[Kind], start: int, length: int) -> tuple[tuple[Kind, ...], int]:
    """Returns where the repetitions of the pattern of `length` layers end."""
    pattern = tuple(kinds[start : start + length])
    stop = start + length
    while tuple(kinds[stop : stop + length]) == pattern:
        stop += length
    single = length > 1 and stop == start + length
    return pattern, start if single or len(pattern) < length else stop
