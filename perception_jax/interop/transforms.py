"""Two-way changes of layout between source tensors (PyTorch) and leaves.

A transform maps a list of source tensors to a list of target leaves and back without loss. Targets
have kernels `[in, out]` and convolutions `[h, w, in, out]`; sources `[out, in]`, `[out, in, h, w]`.
Wherever possible the result is a view: slicing a view of a mapped file reads only that slice.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from perception_jax.errors import CheckpointError
from perception_jax.interop.tensors import Shape

Array = Shaped[np.ndarray, "..."]
"""A tensor on the host."""


@runtime_checkable
class Transform(Protocol):
    """Maps one or more source tensors to one or more leaves, and back."""

    def to_targets(self, sources: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """Converts source tensors to leaves; `shapes` are those of the leaves."""

    def to_sources(self, targets: Sequence[Array]) -> list[Array]:
        """The inverse of `to_targets`, bit for bit."""

    def source_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """Returns the source shapes for given leaf shapes; `ValueError` if none fit."""


class _Each(abc.ABC):
    """A transform that treats every tensor on its own."""

    def to_targets(self, sources: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [self._to_target(array, shape) for array, shape in zip(sources, shapes, strict=True)]

    def to_sources(self, targets: Sequence[Array]) -> list[Array]:
        return [self._to_source(array) for array in targets]

    def source_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [self._source_shape(shape) for shape in shapes]

    @abc.abstractmethod
    def _to_target(self, array: Array, shape: Shape) -> Array: ...

    @abc.abstractmethod
    def _to_source(self, array: Array) -> Array: ...

    @abc.abstractmethod
    def _source_shape(self, shape: Shape) -> Shape: ...


@dataclasses.dataclass(frozen=True)
class Identity(_Each):
    """Keeps the tensor unchanged."""

    def _to_target(self, array: Array, shape: Shape) -> Array:
        return array

    def _to_source(self, array: Array) -> Array:
        return array

    def _source_shape(self, shape: Shape) -> Shape:
        return shape


@dataclasses.dataclass(frozen=True)
class Permute(_Each):
    """Permutes axes: axis `k` of the target is axis `axes[k]` of the source."""

    axes: tuple[int, ...]

    def _to_target(self, array: Array, shape: Shape) -> Array:
        return array.transpose(self.axes)

    def _to_source(self, array: Array) -> Array:
        return array.transpose(np.argsort(self.axes))

    def _source_shape(self, shape: Shape) -> Shape:
        if len(shape) != len(self.axes):
            raise ValueError(f"expected {len(self.axes)} axes, found shape {shape}")
        return tuple(shape[k] for k in np.argsort(self.axes))


@dataclasses.dataclass(frozen=True)
class ExtraAxes(_Each):
    """Removes axes of size 1 of the source tensor; `axes` count in its shape.

    `ExtraAxes((0, 1))`: source `(1, 1, D)`, target `(D,)`. `ExtraAxes((0,))`: source `(1,)`,
    target a scalar.
    """

    axes: tuple[int, ...]

    def _to_target(self, array: Array, shape: Shape) -> Array:
        return array.reshape(shape)

    def _to_source(self, array: Array) -> Array:
        return np.expand_dims(array, self.axes)

    def _source_shape(self, shape: Shape) -> Shape:
        rank = len(shape) + len(self.axes)
        if any(not 0 <= axis < rank for axis in self.axes):
            raise ValueError(f"axes {self.axes} do not fit shape {shape}")
        sizes = iter(shape)
        return tuple(1 if axis in self.axes else next(sizes) for axis in range(rank))


@dataclasses.dataclass(frozen=True)
class Reshape(_Each):
    """Reshapes; `shape` is the shape of the source, with at most one -1."""

    shape: tuple[int, ...]

    def _to_target(self, array: Array, shape: Shape) -> Array:
        return array.reshape(shape)

    def _to_source(self, array: Array) -> Array:
        return array.reshape(self._source_shape(array.shape))

    def _source_shape(self, shape: Shape) -> Shape:
        size, known = math.prod(shape), math.prod(n for n in self.shape if n != -1)
        free = size // known if known else 0
        resolved = tuple(free if n == -1 else n for n in self.shape)
        if math.prod(resolved) != size:
            raise ValueError(f"{self.shape} does not hold the {size} elements of {shape}")
        return resolved


@dataclasses.dataclass(frozen=True)
class RopePermute(_Each):
    """Order of the rows of a q or k projection (weight or bias, axis 0) under rotary positions.

    "interleaved" rotates the pairs (0, 1), (2, 3), … of a head (Meta's Llama, llama.cpp); "half"
    rotates (0, d/2), (1, d/2+1), … (Hugging Face). `source` is the order
    of the source; the target has the other.
    For grouped-query attention `heads` is the number of heads of this tensor.
    """

    heads: int
    source: Literal["interleaved", "half"] = "interleaved"

    def _to_target(self, array: Array, shape: Shape) -> Array:
        return self._swap(array, interleaved=self.source == "interleaved")

    def _to_source(self, array: Array) -> Array:
        return self._swap(array, interleaved=self.source == "half")

    def _source_shape(self, shape: Shape) -> Shape:
        if not shape or shape[0] % (2 * self.heads):
            raise ValueError(f"axis 0 of {shape} is not {self.heads} heads of even size")
        return shape

    def _swap(self, array: Array, interleaved: bool) -> Array:
        half = array.shape[0] // (2 * self.heads)
        split = (self.heads, half, 2) if interleaved else (self.heads, 2, half)
        return array.reshape(*split, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


@dataclasses.dataclass(frozen=True)
class Split:
    """Splits one source tensor into several leaves along the source's `axis`."""

    axis: int = 0

    def to_targets(self, sources: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        (whole,) = sources
        ends = np.cumsum([shape[self.axis] for shape in shapes])
        return np.split(whole, ends[:-1], self.axis)

    def to_sources(self, targets: Sequence[Array]) -> list[Array]:
        return [np.concatenate(targets, self.axis)]

    def source_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        rests = {(*shape[: self.axis], *shape[self.axis + 1 :]) for shape in shapes}
        if len(rests) != 1 or any(len(shape) <= self.axis for shape in shapes):
            raise ValueError(f"parts {list(shapes)} do not join along axis {self.axis}")
        total = sum(shape[self.axis] for shape in shapes)
        first = shapes[0]
        return [(*first[: self.axis], total, *first[self.axis + 1 :])]


@dataclasses.dataclass(frozen=True)
class Concat:
    """Concatenates several source tensors to one leaf along the leaf's `axis`.

    Attributes:
      parts: how many equal parts, or the size of each along `axis`.
    """

    parts: int | tuple[int, ...]
    axis: int = 0

    def to_targets(self, sources: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [np.concatenate(sources, self.axis)]

    def to_sources(self, targets: Sequence[Array]) -> list[Array]:
        (whole,) = targets
        return np.split(whole, np.cumsum(self._sizes(whole.shape))[:-1], self.axis)

    def source_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        (shape,) = shapes
        before, after = shape[: self.axis], shape[self.axis + 1 :]
        return [(*before, size, *after) for size in self._sizes(shape)]

    def _sizes(self, shape: Shape) -> tuple[int, ...]:
        if len(shape) <= self.axis:
            raise ValueError(f"shape {shape} has no axis {self.axis}")
        total, parts = shape[self.axis], self.parts
        sizes = (total // parts,) * parts if isinstance(parts, int) else parts
        if sum(sizes) != total:
            raise ValueError(f"axis {self.axis} of {shape} is not made of parts {parts}")
        return sizes


@dataclasses.dataclass(frozen=True)
class FoldedPosition:
    """A class token that already holds its position, whose row is missing in the source's table.

    Theirs: token `(1, 1, D)` and table `(1, N, D)`. Ours: token `(D,)` and table `(1 + N, D)`, with
    zeros in the first row after an import. An export adds that row to the token.
    """

    def to_targets(self, sources: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        token, table = sources
        row = np.zeros((1, table.shape[2]), table.dtype)
        return [token.reshape(shapes[0]), np.concatenate([row, table[0]])]

    def to_sources(self, targets: Sequence[Array]) -> list[Array]:
        token, table = targets
        # Adding zero would turn -0.0 into 0.0.
        token = np.where(table[0] == 0, token, token + table[0])
        return [token[None, None], table[None, 1:]]

    def source_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        (width,), (rows, columns) = shapes
        if width != columns or rows < 1:
            raise ValueError(f"a token {shapes[0]} and a table {shapes[1]} do not belong together")
        return [(1, 1, width), (1, rows - 1, width)]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A leaf that the source model lacks because it always has `value` there.

    For rules without a source, e.g. the zero bias of EVA's keys.
    """

    value: float = 0.0

    def to_targets(self, sources: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        return [np.broadcast_to(np.float32(self.value), shape) for shape in shapes]

    def to_sources(self, targets: Sequence[Array]) -> list[Array]:
        for array in targets:
            if not np.all(array == self.value):
                raise CheckpointError(
                    f"the layout has no name for this tensor, which is always {self.value} there; "
                    "found other values. Freeze it in training, or export to the layout 'jax'."
                )
        return []

    def source_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return []


@dataclasses.dataclass(frozen=True)
class Dropped(Constant):
    """A leaf used only in training, which the source layout does not store.

    `value` after an import; an export leaves it out, whatever it holds.
    """

    def to_sources(self, targets: Sequence[Array]) -> list[Array]:
        return []


LOSSY = (Dropped, FoldedPosition)
"""Transforms after which a leaf may differ after a round trip; the outputs stay the same."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """Applies several transforms in order, from source to leaves."""

    steps: tuple[Transform, ...]

    def to_targets(self, sources: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        wanted = [list(shapes)]
        for step in reversed(self.steps[1:]):
            wanted.append(step.source_shapes(wanted[-1]))
        for step, step_shapes in zip(self.steps, reversed(wanted), strict=True):
            sources = step.to_targets(sources, step_shapes)
        return list(sources)

    def to_sources(self, targets: Sequence[Array]) -> list[Array]:
        for step in reversed(self.steps):
            targets = step.to_sources(targets)
        return list(targets)

    def source_shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        for step in reversed(self.steps):
            shapes = step.source_shapes(shapes)
        return list(shapes)


def chain(*steps: Transform) -> Chain:
    """Makes a `Chain`; the first step takes the source tensors, the last gives the targets."""
    return Chain(steps)


IDENTITY = Identity()
"""The transform that changes nothing."""
LINEAR = Permute((1, 0))
"""Transposes `[out, in]` to `[in, out]`."""
CONV = Permute((2, 3, 1, 0))
"""Transposes `[out, in, h, w]` to `[h, w, in, out]`."""
SPLIT_LINEAR = chain(Split(0), LINEAR)
"""Splits a fused `[q; k; v]` weight into one `[in, out]` kernel each."""
