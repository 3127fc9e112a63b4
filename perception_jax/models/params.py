"""A model's leaves as a flat dict, path → array: the form in which rooms exchange parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def flatten(model: nnx.Module, only: type[nnx.Variable] = nnx.Variable) -> dict[str, Any]:
    """Every leaf by its "/"-joined path, e.g. `vision/blocks/attention/q_proj/kernel`.

    `only` keeps those of one kind, e.g. `AdapterParam`. For an abstract model (`nnx.eval_shape`)
    the values are `jax.ShapeDtypeStruct`s.
    """
    flat = nnx.to_flat_state(nnx.state(model, only))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def with_inserts(path: str, stack: str) -> str:
    """The path of a leaf of a model in which an `nn.stack.Inserted` takes the place of a stack.

    Args:
      path: of the leaf in the model without inserts.
      stack: path of the stack, e.g. "vision/blocks"; leaves elsewhere keep their paths.
    """
    inside = path.removeprefix(f"{stack}/")
    return path if inside == path else f"{stack}/base/{inside}"


def unflatten(model: Model, params: Mapping[str, jax.Array]) -> Model:
    """The model with its leaves replaced by `params`, which must hold every one of them."""
    graphdef, state = nnx.split(model)
    nested = nnx.to_pure_dict(state)
    for path, value in params.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node[parent]
        node[name] = value
    return nnx.merge(graphdef, nnx.State(nested))
