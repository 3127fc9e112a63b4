"""The state of a run, and models as flat dicts of leaves.

A model is split once into a static graph and two flat dicts, `path → array` with "/"-joined
paths: what trains and what is frozen. Optimizer rules, sharding rules, checkpoints and pretrained
weights all speak of those paths. Only `trainable` has gradients and optimizer state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from perception_jax.errors import ConfigError
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import rules as rules_lib
from perception_jax.train.config import DEFAULT_RULES, OptimRule
from perception_jax.train.optim import frozen_paths
from perception_jax.train.task import Task

Leaves = dict[str, Any]
"""Arrays, shapes or shardings by "/"-joined path."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. The leaves may also be shapes or shardings of those arrays (hence
    the loose annotations: JAX puts its own placeholders here as well).

    Attributes:
      step: int32[]; updates done.
      trainable, frozen: the model's leaves by path.
      opt_state: optax's state over `trainable`.
      ema: moving average of `trainable`, or None.
      key: uint32[2], data of the key that each step's key is folded from.
    """

    step: Any
    trainable: Any
    frozen: Any
    opt_state: Any
    ema: Any
    key: Any


@dataclasses.dataclass(frozen=True)
class AbstractModel:
    """A model without its arrays.

    Attributes:
      graphdef: NNX's static half.
      trainable, frozen: `jax.ShapeDtypeStruct` by path.
      keys: the nested keys behind each path.
    """

    graphdef: nnx.GraphDef
    trainable: Leaves
    frozen: Leaves
    keys: Mapping[str, tuple[Any, ...]]

    def merge(self, trainable: Leaves, frozen: Leaves) -> nnx.Module:
        """The module with these leaves (arrays or tracers)."""
        return nnx.merge(self.graphdef, self._nest(trainable), self._nest(frozen))

    def _nest(self, leaves: Leaves) -> Mapping[Any, Any]:
        nested: dict[Any, Any] = {}
        for path, leaf in leaves.items():
            *parents, last = self.keys[path]
            inner = nested
            for key in parents:
                inner = inner.setdefault(key, {})
            inner[last] = leaf
        return nnx.State(nested)


def abstract_model(
    task: Task, frozen_dtype: str = "float32", rules: Iterable[OptimRule] = DEFAULT_RULES
) -> AbstractModel:
    """Traces `task.init` for shapes only.

    Args:
      frozen_dtype: of floating leaves that do not train; "float32" keeps that of the model.
      rules: of the optimizer; leaves that they freeze count as frozen, whatever the task says.

    Raises:
      ConfigError: `task.trainable` selects nothing, or some leaves match no rule.
    """
    model = nnx.eval_shape(lambda: task.init(jax.random.key(0)))
    graphdef, trainable, frozen = nnx.split(model, task.trainable, ...)
    keyed = {**_by_keys(trainable), **_by_keys(frozen)}
    flat = _flatten(trainable)
    if not flat:
        raise ConfigError(
            f"the task's filter `trainable` ({task.trainable!r}) selects none of the model's "
            f"{len(keyed)} leaves. Use nnx.Param to train all parameters."
        )
    kept = _flatten(frozen) | {path: flat.pop(path) for path in frozen_paths(rules, flat)}
    kept = _with_frozen_dtype(kept, frozen_dtype)
    return AbstractModel(graphdef, flat, kept, {_path(k): k for k in keyed})


def abstract_state(
    model: AbstractModel, transform: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """The shapes of a whole state."""
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        trainable=model.trainable,
        frozen=model.frozen,
        opt_state=jax.eval_shape(transform.init, model.trainable),
        ema=dict(model.trainable) if ema else None,
        key=jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
    )


def state_shardings(abstract: TrainState, rules: rules_lib.Rules, mesh: Mesh) -> TrainState:
    """Returns the sharding of each leaf of the state; optimizer state follows its parameter.

    Raises:
      ConfigError: see `shard.rules.shardings`.
    """
    leaves = rules_lib.shardings({**abstract.trainable, **abstract.frozen}, rules, mesh)
    trainable = {path: leaves[path] for path in abstract.trainable}
    everywhere = mesh_lib.replicated(mesh)

    def beside_parameter(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        path = next((k.key for k in reversed(keys) if getattr(k, "key", None) in trainable), None)
        same = path is not None and leaf.shape == abstract.trainable[path].shape
        return trainable[path] if same else everywhere

    return TrainState(
        step=everywhere,
        trainable=trainable,
        frozen={path: leaves[path] for path in abstract.frozen},
        opt_state=jax.tree.map_with_path(beside_parameter, abstract.opt_state),
        ema=None if abstract.ema is None else dict(trainable),
        key=everywhere,
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes that carry their shardings: the target of a restore."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def init_state(
    task: Task,
    transform: optax.GradientTransformation,
    shardings: TrainState,
    seed: int,
    frozen_dtype: str = "float32",
) -> TrainState:
    """Initialises a state in shards: the task's pretrained leaves, and the others at random.

    Args:
      frozen_dtype: see `abstract_model`.

    Raises:
      ConfigError: `task.pretrained` returns a path or a shape that the model does not have.
    """
    model_key, step_key = jax.random.split(jax.random.key(seed))

    places = {**shardings.trainable, **shardings.frozen}
    model = abstract_model(task)
    shapes = {**model.trainable, **model.frozen}
    kept = _with_frozen_dtype({path: shapes[path] for path in shardings.frozen}, frozen_dtype)
    targets = with_shardings(shapes | kept, places)
    given = _pretrained(task, targets)
    missing = {path: place for path, place in places.items() if path not in given}

    def parameters(key: jax.Array) -> Leaves:
        # What is not returned is not computed either: the compiler drops its random numbers.
        _, trainable, frozen = nnx.split(task.init(key), task.trainable, ...)
        fresh = {**_flatten(trainable), **_flatten(frozen)}
        return {path: _with_dtype(fresh[path], targets[path].dtype) for path in missing}

    leaves = given | jax.jit(parameters, out_shardings=missing)(model_key)
    trainable = {path: leaves[path] for path in shardings.trainable}
    frozen = {path: leaves[path] for path in shardings.frozen}

    def rest(trainable: Leaves, key: jax.Array) -> tuple[Any, ...]:
        # The average is a copy: the step donates both, and a buffer can be donated once only.
        ema = None if shardings.ema is None else jax.tree.map(jnp.copy, trainable)
        return jnp.int32(0), transform.init(trainable), ema, jax.random.key_data(key)

    placed = (shardings.step, shardings.opt_state, shardings.ema, shardings.key)
    step, opt_state, ema, key = jax.jit(rest, out_shardings=placed)(trainable, step_key)
    return TrainState(step, trainable, frozen, opt_state, ema, key)


def _pretrained(task: Task, targets: Mapping[str, jax.ShapeDtypeStruct]) -> Leaves:
    """The task's pretrained leaves with the dtype and sharding of their targets."""
    placed = {}
    for path, value in task.pretrained(targets).items():
        target = targets.get(path)
        if target is None:
            raise ConfigError(f"pretrained: the model has no leaf {path!r}.")
        if tuple(value.shape) != target.shape:
            raise ConfigError(
                f"pretrained: {path} has shape {target.shape}, the given array "
                f"{tuple(value.shape)}."
            )
        placed[path] = place_like(value, target)
    return placed


def place_like(value: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
    """An array with the dtype and sharding of its target; one that has both is not copied."""
    if not isinstance(value, jax.Array):
        value = np.asarray(value)
    return jax.device_put(value.astype(target.dtype, copy=False), target.sharding)


def _with_frozen_dtype(leaves: Leaves, dtype: str) -> Leaves:
    """Shapes of leaves that do not train; see `abstract_model`."""
    if dtype == "float32":
        return leaves
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else leaf
        for path, leaf in leaves.items()
    }


def _with_dtype(leaf: jax.Array, dtype: Any) -> jax.Array:
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)  # keys cannot be cast


def _flatten(state: Mapping[Any, Any]) -> Leaves:
    return {_path(keys): leaf for keys, leaf in _by_keys(state).items()}


def _by_keys(state: Mapping[Any, Any]) -> dict[tuple[Any, ...], Any]:
    flat: dict[tuple[Any, ...], Any] = {}

    def walk(node: Mapping[Any, Any], keys: tuple[Any, ...]) -> None:
        for key, value in node.items():
            if isinstance(value, Mapping):
                walk(value, (*keys, key))
            else:
                flat[(*keys, key)] = value

    walk(nnx.to_pure_dict(state), ())
    return flat


def _path(keys: tuple[Any, ...]) -> str:
    return "/".join(map(str, keys))
