"""Modules with stacked leaves: equal layers, layers of several kinds, and inserts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from perception_jax.errors import ConfigError

BlockModule = TypeVar("BlockModule", bound=nnx.Module)
"""Type of a block."""
Model = TypeVar("Model", bound=nnx.Module)
"""Type of a model."""
Stacked = TypeVar("Stacked")
"""Type of a pytree with stacked leaves."""

InsertPosition = str | int
"""Where an insert stands: "before" a block's first sub-layer, "between" them (before the last, the
MLP), "after" all, or behind so many of them."""


class Mixed(nnx.Module):
    """A stack of layers of several kinds, e.g. with cross-attention in every other layer.

    Args:
      stacks: from `init`, one for each kind, over the layers of that kind alone.
      layout: the kind of each layer.

    Raises:
      ConfigError: a layout that does not fit the stacks.
    """

    def __init__(self, stacks: Mapping[str, nnx.Module], layout: Sequence[str]):
        self.stacks = nnx.Dict(stacks)
        self.layout = tuple(layout)
        found = {name: depth_of(stack) for name, stack in stacks.items()}
        wanted = {name: self.layout.count(name) for name in (*stacks, *self.layout)}
        if found != wanted:
            raise ConfigError(
                f"a stack of several kinds: expected as many layers of each as in the layout, "
                f"{wanted}, found {found}."
            )


class Inserted(nnx.Module):
    """A stack with inserts in some of its layers.

    Takes the place of the stack `base` in a model. Run without a context it is `base`, bit for bit.

    Args:
      base: from `init`, or any other stack: inserts at several places are put in one after the
        other.
      inserts: from `init`, one for each of `layers`.
      layers: where they go, ascending.
      place: where in each block.
    """

    def __init__(
        self,
        base: nnx.Module,
        inserts: nnx.Module,
        layers: tuple[int, ...],
        place: InsertPosition = "between",
    ):
        self.base = base
        self.inserts = inserts
        self.layers = layers
        self.place = place


class Separate(nnx.Module):
    """A stack whose layers have separate leaves; see `separate`."""

    def __init__(self, layers: Sequence[nnx.Module]):
        self.layers = nnx.List(layers)


def init(make: Callable[[nnx.Rngs], BlockModule], depth: int, *, rngs: nnx.Rngs) -> BlockModule:
    """Makes `depth` blocks as one module whose leaves have a leading layer axis."""
    keys = jax.random.split(rngs.params(), depth)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def residual_gain(depth: int) -> float:
    """Returns CLIP's factor on the initial weights at the ends of its 2 × `depth` residual
    branches.

    The sum of all branches then starts as large as their input (GPT-2, §2.3; in OpenAI's CLIP code
    `proj_std`).
    """
    return (2 * depth) ** -0.5


def depth_of(blocks: nnx.Module) -> int:
    """Number of layers in a stacked module."""
    base = base_of(blocks)
    if isinstance(base, Mixed):
        return len(base.layout)
    return len(base.layers) if isinstance(base, Separate) else jax.tree.leaves(base)[0].shape[0]


def base_of(blocks: nnx.Module) -> nnx.Module:
    """Returns the stack without inserts."""
    return base_of(blocks.base) if isinstance(blocks, Inserted) else blocks


def part(stacked: Stacked, start: int, stop: int) -> Stacked:
    """Returns layers `start` to `stop` (exclusive) of a pytree with stacked leaves."""
    if isinstance(stacked, Separate):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *stacked.layers[start:stop])
    return jax.tree.map(lambda leaf: leaf[start:stop], stacked)


def separate(model: Model, *, keep: bool = False) -> Model:
    """Returns the same model for faster inference: each layer of its stacks as one module.

    `run` then goes through the layers without a loop, which spares a copy of each layer's weights
    on CPU and the loop's overhead on GPU; outputs are the same. It takes longer to compile. The
    parameters have other paths, so such a model is neither trained nor exported.

    The stacks of `model` are consumed leaf by leaf, so that at no moment there is more than the
    model and one leaf of it: `model` cannot be used afterwards (`model = separate(model)`).

    Args:
      keep: leave `model` usable; both together take twice the memory.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    for name, child in list(vars(model).items()):
        if name == "blocks":
            setattr(model, name, _separate_stack(child, keep=keep))
        elif isinstance(child, nnx.Module):
            setattr(model, name, separate(child, keep=keep))
    return model


def _separate_stack(blocks: nnx.Module, *, keep: bool) -> nnx.Module:
    if isinstance(blocks, Separate):
        return blocks
    if isinstance(blocks, Inserted):
        base = _separate_stack(blocks.base, keep=keep)
        return Inserted(base, blocks.inserts, blocks.layers, blocks.place)
    if isinstance(blocks, Mixed):
        stacks = {name: _separate_stack(one, keep=keep) for name, one in blocks.stacks.items()}
        return Mixed(stacks, blocks.layout)
    leaves, structure = jax.tree.flatten(blocks)
    layers = zip(*(_unstack(leaf, keep=keep) for leaf in leaves), strict=True)
    return Separate([structure.unflatten(layer) for layer in layers])


def _unstack(leaf: jax.Array, *, keep: bool) -> tuple[jax.Array, ...]:
    layers = jnp.unstack(leaf)
    if not keep and isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        jax.block_until_ready(layers)  # else the next leaf is copied before this one is gone
        leaf.delete()
    return layers
