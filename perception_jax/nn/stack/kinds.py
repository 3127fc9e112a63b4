"""Kinds of the layers of a stack, by their block, inserts and recorded values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.nn.stack.layer import Context
from perception_jax.nn.stack.stacked import Inserted, InsertPosition
from perception_jax.nn.taps import Taps, layer_indices


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The static properties of a layer; layers of one kind run the same program.

    Attributes:
      name: in the stack's layout.
      attention, cross, hidden: whether they are recorded.
      inserts: of each group of inserts, whether the layer has one of them.
      tapped_inserts: whether their attention is recorded.
      widens: whether the batch grows to the context's rows at the layer's first insert.
    """

    name: str | None = None
    attention: bool = False
    cross: bool = False
    hidden: bool = False
    inserts: tuple[bool, ...] = ()
    tapped_inserts: bool = False
    widens: bool = False


@dataclasses.dataclass(frozen=True)
class InsertGroup:
    """A group of inserts, stacked over `layers`, at one position of their blocks."""

    inserts: nnx.Module
    layers: tuple[int, ...]
    place: InsertPosition

    def position(self, steps: int) -> int:
        """Number of the block's steps before the inserts.

        Raises:
          ConfigError: no such place.
        """
        named = {"before": 0, "between": steps - 1, "after": steps}
        found = named.get(self.place, self.place)
        if isinstance(found, str) or not 0 <= found <= steps:
            raise ConfigError(
                f"place of inserts: expected one of {', '.join(named)} or a number of steps in "
                f"[0, {steps}], found {self.place!r}."
            )
        return found


def insert_groups(blocks: nnx.Module) -> tuple[InsertGroup, ...]:
    """Returns the groups of inserts of a stack in the order in which they were added."""
    if not isinstance(blocks, Inserted):
        return ()
    return (*insert_groups(blocks.base), InsertGroup(blocks.inserts, blocks.layers, blocks.place))


def of_kind(choice: Any, kind: LayerKind, what: str) -> Any:
    """Returns `choice` itself, or its entry for layers of a kind.

    Raises:
      ConfigError: it holds nothing for them.
    """
    if not isinstance(choice, Mapping):
        return choice
    if kind.name not in choice:
        found = "without a layout" if kind.name is None else f"of kind {kind.name!r}"
        raise ConfigError(
            f"{what}: expected one for each kind of layer, found {sorted(choice)} and a layer "
            f"{found}."
        )
    return choice[kind.name]


def kinds_of(
    placed: Sequence[InsertGroup],
    layout: Sequence[str] | None,
    start: int,
    stop: int,
    taps: Taps,
    context: Context | None,
) -> tuple[LayerKind, ...]:
    """Returns the kinds of the layers 0 to `stop`, of which those from `start` on run.

    Raises:
      ConfigError: a context for a stack without inserts, or taps on what comes before the batch
        grows.
    """
    attention = layer_indices(taps.attention, stop, start)
    cross = layer_indices(taps.cross, stop, start)
    hidden = layer_indices(taps.hidden, stop + 1, start)
    tapped = layer_indices(taps.inserts, stop, start)
    if context is not None and not placed:
        raise ConfigError(
            "a context was given, but this stack has no inserts that could use it: put adapters "
            "in first, e.g. with nn.stack.Inserted."
        )
    used = {layer for group in placed for layer in group.layers} if context is not None else set()
    if missing := set(tapped) - used:
        raise ConfigError(
            f"taps request the inserts of layers {sorted(missing)}; this call uses inserts in "
            f"layers {sorted(used)}."
        )
    first = _first_wide(used, start, stop, context)
    if first is not None and min((*attention, *cross, *hidden), default=stop) <= first:
        raise ConfigError(
            f"taps on layers up to {first} record the batch before it grows to its rows there; "
            "record later layers, or repeat the images instead."
        )
    return tuple(
        LayerKind(
            name=None if layout is None else layout[layer],
            attention=layer in attention,
            cross=layer in cross,
            hidden=layer + 1 in hidden,
            inserts=tuple(context is not None and layer in group.layers for group in placed),
            tapped_inserts=layer in tapped,
            widens=layer == first,
        )
        for layer in range(stop)
    )


def _first_wide(used: set[int], start: int, stop: int, context: Context | None) -> int | None:
    """The layer in which the batch grows, if it does."""
    if context is None or context.repeats == 1:
        return None
    first = min((layer for layer in used if layer >= start), default=None)
    if first is None or first >= stop:
        raise ConfigError(
            f"the first insert is in layer {first}, but only {stop} layers run: the batch never "
            "grows to the context's rows. Run more layers, or give one row an example."
        )
    return first
