"""A model's leaves as a flat dict from path to array, the form used for exchange."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)
"""Type of a model."""


def flatten(model: nnx.Module, only: type[nnx.Variable] = nnx.Variable) -> dict[str, Any]:
    """Returns every leaf by its "/"-joined path, e.g. `vision/blocks/attention/q_proj/kernel`.

    `only` keeps those of one kind, e.g. `AdapterParam`. For an abstract model (`nnx.eval_shape`)
    the values are `jax.ShapeDtypeStruct`s.
    """
    flat = nnx.to_flat_state(nnx.state(model, only))
    return {"/".join(map(str, path)): variable.get_value() for path, variable in flat}


def with_inserts(path: str, stack: str) -> str:
    """Converts a leaf's path for a model in which an `nn.stack.Inserted` replaces a stack.

    Args:
      path: of the leaf in the model without inserts.
      stack: path of the stack, e.g. "vision/blocks"; leaves elsewhere keep their paths.
    """
    inside = path.removeprefix(f"{stack}/")
    return path if inside == path else f"{stack}/base/{inside}"


def unflatten(model: Model, params: Mapping[str, Any]) -> Model:
    """Returns the model with its leaves (arrays or shapes) replaced by `params`, which must contain
    all of them."""
    graphdef, state = nnx.split(model)
    nested = nnx.to_pure_dict(state)
    for path, value in params.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node[parent]
        node[name] = value
    return nnx.merge(graphdef, nnx.State(nested))
