"""Export: parameters under the names of a layout, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import EllipsisType

import jax
import jax.numpy as jnp
import numpy as np

from perception_jax.errors import CheckpointError
from perception_jax.interop.binding import Binding, bind
from perception_jax.interop.rules import RuleTable
from perception_jax.interop.tensors import LazyTensor, TensorSpec


def export_params(
    table: RuleTable, params: Mapping[str, jax.Array | np.ndarray]
) -> Iterator[LazyTensor]:
    """Every tensor of a complete checkpoint, in the order of the table's rules.

    Names, shapes and dtypes are known at once; `LazyTensor.read` fetches from the devices only the
    layer it needs.

    Args:
      table: the model's name rules for the wanted layout.
      params: leaves by path, all addressable from this process.

    Raises:
      CheckpointError: the table does not cover the leaves, leaves that form one source tensor
        differ in dtype, or a leaf holds values for which the layout has no place.
    """
    for path, leaf in params.items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            raise CheckpointError(
                f"Expected leaves that this process can read whole, found {path} spread over "
                f"several processes. Export from a checkpoint restored on one process."
            )
    for binding in bind(table, {path: tuple(leaf.shape) for path, leaf in params.items()}):
        yield from _tensors(binding, params)
    for name, value in table.buffers.items():
        yield LazyTensor(name, TensorSpec(value.shape, value.dtype), lambda value=value: value)


def _tensors(
    binding: Binding, params: Mapping[str, jax.Array | np.ndarray]
) -> Iterator[LazyTensor]:
    dtypes = {np.dtype(params[path].dtype) for path in binding.targets}
    if len(dtypes) != 1:
        raise CheckpointError(
            f"Expected one dtype for {binding.targets}, which form one source tensor, found "
            f"{sorted(map(str, dtypes))}."
        )
    (dtype,) = dtypes
    if not binding.rule.sources:
        _check_constant(binding, params)
    for k, names in enumerate(binding.layers):
        for part, (name, shape) in enumerate(zip(names, binding.source_shapes, strict=True)):

            def read(k: int = k, part: int = part) -> np.ndarray:
                return _layer(binding, params, k)[part]

            yield LazyTensor(name, TensorSpec(shape, dtype), read)


def _check_constant(binding: Binding, params: Mapping[str, jax.Array | np.ndarray]) -> None:
    try:
        _layer(binding, params, 0)
    except CheckpointError as error:
        raise CheckpointError(f"Cannot export {', '.join(binding.targets)}: {error}") from error


def _layer(
    binding: Binding, params: Mapping[str, jax.Array | np.ndarray], k: int
) -> list[np.ndarray]:
    """Returns the source tensors of layer `k`."""
    layer = k if binding.stacked else ...
    targets = [on_host(params[path], layer) for path in binding.targets]
    return binding.rule.transform.to_sources(targets)


def on_host(leaf: jax.Array | np.ndarray, layer: int | EllipsisType) -> np.ndarray:
    """Copies a layer of a leaf, or all of it, to the host without caching it there."""
    if isinstance(leaf, jax.Array) and not _is_host_memory(leaf):
        # JAX keeps what numpy has read of an array on that array: read a temporary one.
        return np.asarray(jnp.copy(leaf) if layer is ... else leaf[layer])
    return np.asarray(np.asarray(leaf)[layer])


def _is_host_memory(leaf: jax.Array) -> bool:
    """Whether numpy sees the leaf without a copy."""
    (device, *others) = leaf.devices()
    return not others and device.platform == "cpu"
