"""A state as a nested dict of arrays, independent of the classes of optax and of this library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from perception_jax.train.state import TrainState

_SHOWN = 8


def to_tree(state: TrainState) -> dict[str, Any]:
    """The state's parts by name; the optimizer's leaves by "/"-joined path."""
    tree = {
        "step": state.step,
        "trainable": state.trainable,
        "frozen": state.frozen,
        "opt_state": flatten(state.opt_state),
        "key": state.key,
    }
    return tree if state.ema is None else {**tree, "ema": state.ema}


def from_tree(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    """The inverse of `to_tree`; `like` gives the optimizer state's structure."""
    return TrainState(
        step=tree["step"],
        trainable=tree["trainable"],
        frozen=tree["frozen"],
        opt_state=jax.tree.map_with_path(
            lambda keys, _: tree["opt_state"][_name(keys)], like.opt_state
        ),
        ema=tree.get("ema"),
        key=tree["key"],
    )


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their "/"-joined paths, e.g. `trainable/head/kernel`."""
    return {_name(keys): leaf for keys, leaf in jax.tree.leaves_with_path(tree)}


def shapes(tree: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shape of every leaf by its path; JSON-able."""
    return {path: list(leaf.shape) for path, leaf in flatten(tree).items()}


def differences(tree: Mapping[str, Any], saved: Mapping[str, list[int]]) -> str:
    """Describes how the leaves of `tree` differ from saved ones; "" if they agree.

    Only the parts that `tree` has are compared, e.g. "trainable" alone.
    """
    wanted = shapes(tree)
    there = {name: shape for name, shape in saved.items() if name.split("/")[0] in tree}
    found = []
    for name in sorted(wanted.keys() | there.keys()):
        old, new = there.get(name), wanted.get(name)
        if old != new:
            found.append(f"{name}: {_shape(old)} in the checkpoint, {_shape(new)} in the model")
    more = f"\n  … and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return "\n  ".join(found[:_SHOWN]) + more


def _shape(shape: list[int] | None) -> str:
    return "absent" if shape is None else str(tuple(shape))


def _name(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
