"""Plans of generation on a slice: the prefill and a step of the decode loop, see `shard.plan`.

Letters: L layers, B batch, M key-value heads, S capacity of the cache, H head width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perception_jax import settings
from perception_jax.errors import ConfigError
from perception_jax.generate import Appended, Decoded, decode, prefill
from perception_jax.interop.dtypes import floating_dtype
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.registry import architecture_of
from perception_jax.nn.int8 import quantize_linear
from perception_jax.ops.sharding import BATCH_AXES, TENSOR
from perception_jax.settings import Integer
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import plan, program, rules
from perception_jax.shard.flops import count_jaxpr
from perception_jax.shard.slices import Slice

_COUNT = Integer(1, 2**20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """How a language model is served.

    Attributes:
      batch_size: texts at a time.
      prompt: tokens of the prefill, the length of a bucket.
      context: tokens that the cache has room for.
      dtype: of floating weights and of the cache.
      int8: whether the kernels of linear layers are int8.
      mesh: sizes of the axes.

    Raises:
      ConfigError: a field of another type or out of range, or a prompt longer than the context.
    """

    batch_size: int = 1
    prompt: int = 1024
    context: int = 2048
    dtype: str = "bfloat16"
    int8: bool = False
    mesh: mesh_lib.MeshConfig = dataclasses.field(
        default_factory=lambda: mesh_lib.MeshConfig(fsdp=1, tensor=-1)
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "prompt", "context"):
            settings.check(getattr(self, name), _COUNT, f"Serving.{name}")
        settings.check(self.int8, settings.FLAG, "Serving.int8")
        floating_dtype(self.dtype)
        if self.prompt > self.context:
            raise ConfigError(
                f"Serving: expected a prompt of at most {self.context} tokens (context), found "
                f"{self.prompt}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingPlan(plan.ProgramPlan):
    """A compiled prefill, or a step of the decode loop, on a slice.

    `state_bytes` are those of the weights and the cache. `memory_seconds` is the time to read the
    weights (of an embedding table only the rows of the tokens) and the whole cache once.

    Attributes:
      tokens: of all texts that a step processes.
      weight_bytes: on one chip.
      cache_bytes: on one chip.
    """

    tokens: int
    weight_bytes: int
    cache_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Most tokens per second of all texts together, see `step_seconds`."""
        return self.tokens / self.step_seconds

    def to_json(self) -> dict[str, Any]:
        """All numbers, those of properties among them."""
        return super().to_json() | {"tokens_per_second": self.tokens_per_second}


def serving_plans(
    config: Any, serving: Serving, found: Slice, devices: Sequence[jax.Device]
) -> list[ServingPlan]:
    """Compiles what `generate.Generator` runs, for a slice.

    Args:
      config: of the model.
      devices: of the slice.

    Returns:
      The plan of the prefill and that of one step of the decode loop.

    Raises:
      ConfigError: a mesh that does not fit the slice, or a context longer than the model's.
    """
    mesh = mesh_lib.make_mesh(**dataclasses.asdict(serving.mesh), devices=devices)
    with jax.set_mesh(mesh):
        served = _Served.of(config, serving, mesh)
        return [served.plan(kind, found) for kind in ("prefill", "decode")]


@dataclasses.dataclass(frozen=True)
class _Served:
    """A model on a mesh, with shapes for leaves."""

    config: Any
    serving: Serving
    mesh: Mesh
    model: nnx.Module
    shardings: dict[str, NamedSharding]

    @classmethod
    def of(cls, config: Any, serving: Serving, mesh: Mesh) -> _Served:
        architecture = architecture_of(config)
        dtype = floating_dtype(serving.dtype)

        def build() -> nnx.Module:
            model = architecture.build(config, rngs=nnx.Rngs(params=0))
            model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
            return quantize_linear(model) if serving.int8 else model

        model = nnx.eval_shape(build)
        leaves = flatten(model)
        placed = rules.place(leaves, architecture.shardings, mesh).shardings
        placed_leaves = {path: _placed(leaf, placed[path]) for path, leaf in leaves.items()}
        return cls(config, serving, mesh, unflatten(model, placed_leaves), placed)

    def plan(self, kind: Literal["prefill", "decode"], found: Slice) -> ServingPlan:
        """Compiles one of both programs."""
        traced = self._trace(kind, self.serving.batch_size)
        done = plan.compiled(traced.lower())
        leaves = flatten(self.model)
        cache = [leaf for leaf in self._state(self.serving.batch_size)[0] if leaf.ndim == 5]
        weights = plan.shard_bytes(leaves, self.shardings)
        cached = plan.shard_bytes(cache, [x.sharding for x in cache])
        rows = self.serving.batch_size
        return ServingPlan(
            **plan.measured(
                done,
                found,
                self.mesh,
                arguments=weights + (cached if kind == "decode" else 0),
                flops=count_jaxpr(traced.jaxpr.jaxpr),
                moved=weights + cached - self._unread(leaves),
            ),
            batch_size=rows,
            state_bytes=weights + cached,
            replicated=plan.largest_replicated(leaves, self.shardings),
            whole=self._whole(done, kind),
            kind=kind,
            tokens=rows * (self.serving.prompt if kind == "prefill" else 1),
            weight_bytes=weights,
            cache_bytes=cached,
        )

    def _trace(self, kind: Literal["prefill", "decode"], rows: int) -> Any:
        if kind == "prefill":
            return jax.jit(self._prefill).trace(self.model, *self._prompts(rows))
        leaves, structure = self._state(rows)

        # One step, so that traffic is that of a token: the text of a program does not say how
        # often this loop runs.
        def step(model: nnx.Module, leaves: list[Any], limit: Any) -> Decoded:
            return decode(model, structure.unflatten(leaves), limit, steps=1)

        limit = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.jit(step, donate_argnums=1).trace(self.model, leaves, limit)

    def _prefill(self, model: nnx.Module, ids: Any, mask: Any) -> Appended:
        return prefill(model, ids, mask, capacity=self.serving.context)

    def _prompts(self, rows: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        shape = (rows, self.serving.prompt)
        split = NamedSharding(self.mesh, PartitionSpec(*self._axes(rows, BATCH_AXES)))
        return tuple(jax.ShapeDtypeStruct(shape, d, sharding=split) for d in (jnp.int32, bool))

    def _state(self, rows: int) -> tuple[list[jax.ShapeDtypeStruct], Any]:
        """Leaves and structure of the state after the prefill, placed as the compiler places it
        there. Caches themselves hold arrays only."""
        structures = []

        def flat(*inputs: Any) -> list[Any]:
            leaves, structure = jax.tree.flatten(self._prefill(*inputs).state)
            structures.append(structure)
            return leaves

        def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            batch, heads = {5: (1, 2), 2: (0, 1), 1: (0, None)}[leaf.ndim]
            heads = None if leaf.dtype == bool else heads
            spec: list[Any] = [None] * leaf.ndim
            spec[batch] = self._axes(leaf.shape[batch], BATCH_AXES)[0]
            if heads is not None:
                spec[heads] = self._axes(leaf.shape[heads], (TENSOR,))[0]
            return _placed(leaf, NamedSharding(self.mesh, PartitionSpec(*spec)))

        leaves = jax.eval_shape(flat, self.model, *self._prompts(rows))
        return list(map(place, leaves)), structures[0]

    def _axes(self, size: int, axes: tuple[str, ...]) -> tuple[Any]:
        divides = size % math.prod(self.mesh.shape[axis] for axis in axes) == 0
        return (axes if divides else None,)

    def _unread(self, leaves: dict[str, Any]) -> int:
        """Bytes of an embedding table that is not the head too."""
        if "lm_head/kernel" not in leaves:
            return 0
        table = {"token_embedding": leaves["token_embedding"]}
        return plan.shard_bytes(table, {path: self.shardings[path] for path in table})

    def _whole(self, done: plan.Compiled, kind: Literal["prefill", "decode"]) -> list[str]:
        """Arrays that hold the global batch, more of a layer's cache than the chip's part, or
        (floating ones) the whole vocabulary, where the mesh divides them."""
        rows, config = self.serving.batch_size, self.config
        found = []
        shards = mesh_lib.batch_shards(self.mesh)
        if shards > 1 and rows % shards == 0 and (found := plan.whole_batch(done, rows)):
            others = rows + 3 * shards
            again = plan.compiled(self._trace(kind, others).lower())
            found = found if plan.whole_batch(again, others) else []
        if done.program is None or self.mesh.shape[TENSOR] == 1:
            return found
        arrays = set(program.results(done.program))
        if config.kv_heads % self.mesh.shape[TENSOR] == 0:
            found += plan.listed(array for array in arrays if self._more_than_a_layer(array))
        if config.vocab_size % self.mesh.shape[TENSOR] == 0:
            floating = (array for array in arrays if array.dtype.startswith(("f", "bf")))
            found += plan.listed(one for one in floating if config.vocab_size in one.shape)
        return found

    def _more_than_a_layer(self, array: program.Result) -> bool:
        """Whether it is larger than a chip's part of the keys of a layer, and made of keys."""
        config, shape = self.config, list(array.shape)
        if len(shape) == 5 and shape[0] == config.depth:
            del shape[0]
        if self.serving.context not in shape or config.head_width not in shape:
            return False
        keys = self.serving.batch_size * config.kv_heads * self.serving.context * config.head_width
        (batch,) = self._axes(self.serving.batch_size, BATCH_AXES)
        shards = self.mesh.shape[TENSOR] * (mesh_lib.batch_shards(self.mesh) if batch else 1)
        return math.prod(shape) > keys // shards


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, np.dtype(leaf.dtype), sharding=sharding)
