"""Import: a checkpoint's tensors into parameters, one at a time, straight to their shards.

Peak host memory is the model's own bytes (nothing, for accelerators) plus one leaf: files are
mapped, each leaf is filled into one buffer that CPU devices adopt without a copy, and a shard
reads only its own part of the file wherever the transform is a view.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from perception_jax.errors import CheckpointError
from perception_jax.interop.binding import Binding, bind
from perception_jax.interop.buffers import aligned_empty, copy_into
from perception_jax.interop.dtypes import floating_dtype
from perception_jax.interop.key_report import KeyReport
from perception_jax.interop.match import Match, match
from perception_jax.interop.rules import RuleTable
from perception_jax.interop.tensors import Shape, TensorFiles, tensor_specs
from perception_jax.interop.transforms import Constant

Convert = Callable[[jax.Array], Mapping[str, jax.Array]]
"""Function from a leaf to the leaves that replace it, by their names in the same module."""


@dataclasses.dataclass(frozen=True)
class LoadedParams:
    """Parameters read from a checkpoint, with a report on all names.

    Attributes:
      params: leaves by path, in the order of the abstract ones; converted leaves in the place of
        those that they replace.
      report: what happened to every name.
    """

    params: dict[str, jax.Array]
    report: KeyReport


def load_params(
    table: RuleTable,
    files: Mapping[str, np.ndarray],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    dtype: Any = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
    targets: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    convert: Mapping[str, Convert] | None = None,
) -> LoadedParams:
    """Fills every leaf of a model from a checkpoint.

    Args:
      table: the model's name rules for the checkpoint's layout.
      files: the checkpoint, from `open_checkpoint`, or a plain dict of arrays.
      abstract: shape and dtype of each leaf by path.
      dtype: for floating leaves, as `dtypes.floating_dtype` takes it; None keeps what the file
        stores (float64 becomes float32 unless `jax_enable_x64` is set).
      shardings: where each leaf goes; None puts all on the default device.
      targets: reads these leaves alone, each in the dtype and, if it has one, to the sharding that
        its target has; `dtype` and `shardings` then say nothing. All names are still matched.
      convert: functions for some leaves by path, each called as soon as its leaf is read, in the
        stored dtype whatever `dtype` is. The leaf is freed before the next one is read.

    Raises:
      CheckpointError: names or shapes do not fit (all reported together), or a tensor's bytes do
        not match its checksum. Checksums are compared when a single process loads.
      ConfigError: a dtype in which models do not run.
    """
    dtype = None if dtype is None else floating_dtype(dtype)
    bindings = bind(table, {path: tuple(leaf.shape) for path, leaf in abstract.items()})
    floating = {
        path: jax.dtypes.issubdtype(leaf.dtype, np.floating) for path, leaf in abstract.items()
    }
    matched = match(table, bindings, files, floating)
    convert = convert or {}
    dtypes = {path: None if path in convert else dtype for path in abstract}
    leaves = _leaves(bindings, matched, files, abstract, dtypes)
    if shardings is not None and (missing := abstract.keys() - shardings.keys()):
        raise CheckpointError(f"Expected a sharding for every leaf, found none for {missing}.")
    leaves = {path: leaves[path] for path in abstract}
    places = dict.fromkeys(abstract) if shardings is None else dict(shardings)
    if targets is not None:
        leaves = {
            path: dataclasses.replace(
                leaves[path], dtype=np.dtype(jax.dtypes.canonicalize_dtype(target.dtype))
            )
            for path, target in targets.items()
        }
        places = {path: target.sharding for path, target in targets.items()}
    params: dict[str, jax.Array] = {}
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, leaf in leaves.items():
            if jax.process_count() == 1:
                leaf.check(pool)
            placed = _place(leaf, places[path], pool)
            params |= _converted(path, placed, convert.get(path))
    return LoadedParams(params, _report(leaves, matched))


def _converted(path: str, leaf: jax.Array, convert: Convert | None) -> dict[str, jax.Array]:
    if convert is None:
        return {path: leaf}
    new = jax.block_until_ready(convert(leaf))
    leaf.delete()
    module = path.rpartition("/")[0]
    return {f"{module}/{name}" if module else name: value for name, value in new.items()}


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A leaf and its source: part `part` of the targets of `binding`."""

    files: Mapping[str, np.ndarray]
    binding: Binding
    part: int
    names: tuple[tuple[str, ...], ...]
    shape: Shape
    stored: np.dtype | None
    dtype: np.dtype
    default: float | None

    def layer(self, k: int) -> np.ndarray:
        """Layer `k` in the target layout and stored dtype; a view where the transform allows."""
        if self.default is not None:
            return np.broadcast_to(np.float32(self.default), self.binding.target_shapes[self.part])
        sources, binding = [self.files[name] for name in self.names[k]], self.binding
        return binding.rule.transform.to_targets(sources, binding.target_shapes)[self.part]

    def read(
        self, index: tuple[slice, ...], pool: concurrent.futures.Executor
    ) -> Shaped[np.ndarray, "*S"]:
        """The part of the leaf that `index` selects, in a buffer of its own."""
        ranges = [range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        out = aligned_empty([len(selected) for selected in ranges], self.dtype)
        if not self.binding.stacked:
            self._fill(out, 0, index)
            return out
        jobs = [pool.submit(self._fill, out[j, ...], k, index[1:]) for j, k in enumerate(ranges[0])]
        for job in jobs:
            job.result()
        return out

    def check(self, pool: concurrent.futures.Executor) -> None:
        """Compares checksums, once for all the leaves that share the tensors."""
        if isinstance(self.files, TensorFiles) and self.part == 0 and self.default is None:
            list(pool.map(self.files.check, {name for layer in self.names for name in layer}))

    def _fill(self, out: np.ndarray, k: int, index: tuple[slice, ...]) -> None:
        source = np.asarray(self.layer(k)[index])
        copy_into(out, source)
        narrowed = out.dtype.kind in "iu" and out.dtype.itemsize < source.dtype.itemsize
        if narrowed and not np.array_equal(out, source):
            raise CheckpointError(
                f"Expected integers that {out.dtype} can hold for {self.binding.targets}, found "
                f"larger ones. Set jax_enable_x64."
            )


def _leaves(
    bindings: tuple[Binding, ...],
    matched: Match,
    files: Mapping[str, np.ndarray],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    dtypes: Mapping[str, np.dtype | None],
) -> dict[str, _Leaf]:
    specs = tensor_specs(files)
    leaves = {}
    for binding in bindings:
        absent = binding.targets in matched.absent
        layers = () if absent else binding.layers
        names = tuple(tuple(matched.files[name] for name in layer) for layer in layers)
        stored = _common_dtype({specs[name].dtype for layer in names for name in layer})
        for part, path in enumerate(binding.targets):
            leaf = abstract[path]
            own = np.dtype(leaf.dtype) if stored is None else stored
            leaves[path] = _Leaf(
                files=files,
                binding=binding,
                part=part,
                names=names,
                shape=tuple(leaf.shape),
                stored=stored,
                dtype=_loaded_dtype(own, dtypes[path]),
                default=binding.rule.default if absent else None,
            )
    return leaves


def _common_dtype(dtypes: set[np.dtype]) -> np.dtype | None:
    """One dtype for all layers of a leaf; None for a leaf that nothing is stored for."""
    if len(dtypes) > 1:
        return np.dtype(jax.numpy.result_type(*dtypes))
    return next(iter(dtypes), None)


def _loaded_dtype(stored: np.dtype, wanted: np.dtype | None) -> np.dtype:
    if wanted is not None and jax.dtypes.issubdtype(stored, np.floating):
        stored = wanted
    return np.dtype(jax.dtypes.canonicalize_dtype(stored))


def _place(
    leaf: _Leaf, sharding: jax.sharding.Sharding | None, pool: concurrent.futures.Executor
) -> jax.Array:
    if sharding is None:
        return jax.device_put(leaf.read((slice(None),) * len(leaf.shape), pool))
    buffers: dict[tuple, np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        # Devices that hold the same part share one host buffer.
        key = tuple((s.start, s.stop) for s in index)
        if key not in buffers:
            buffers[key] = leaf.read(index, pool)
        return buffers[key]

    return jax.make_array_from_callback(leaf.shape, sharding, shard, dtype=leaf.dtype)


def _report(leaves: Mapping[str, _Leaf], matched: Match) -> KeyReport:
    changes = collections.Counter(
        (str(leaf.stored), str(leaf.dtype)) for leaf in leaves.values() if leaf.stored is not None
    )
    sizes = [(math.prod(leaf.shape), leaf.dtype) for leaf in leaves.values()]
    constants = {
        path: leaf.binding.rule.transform.value
        for path, leaf in leaves.items()
        if isinstance(leaf.binding.rule.transform, Constant)
    }
    return KeyReport(
        tensors=len(matched.files),
        leaves=len(leaves),
        parameters=sum(size for size, _ in sizes),
        nbytes=sum(size * dtype.itemsize for size, dtype in sizes),
        ignored=matched.ignored,
        defaults={p: leaf.default for p, leaf in leaves.items() if leaf.default is not None},
        constants=constants,
        buffers=matched.buffers,
        copies=matched.copies,
        dtypes=dict(changes),
    )
