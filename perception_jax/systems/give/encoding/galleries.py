"""Makes galleries: images under instructions, in steps of one shape on a mesh.

Letters: N images, S image side, Q images of a step, B rows of a step, E embedding width, p passes.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from perception_jax.data import images as image_files
from perception_jax.data.loader import make_eval_loader
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record, Source
from perception_jax.data.sources.combine import Subset
from perception_jax.errors import ConfigError
from perception_jax.inference.batches import (
    Batched,
    Call,
    current_mesh,
    fetched,
    fill,
    in_parts,
    place,
)
from perception_jax.shard import mesh as mesh_lib
from perception_jax.systems.give.encoding.plan import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Steered:
    """Images under instructions, on the device or on the host.

    Attributes:
      embedding: conditioned; any lengths.
      presence: logit that the named object is there.
    """

    embedding: Float[Array | np.ndarray, "B E"]
    presence: Float[Array | np.ndarray, " B"]


@runtime_checkable
class SteeredEncoder(Protocol):
    """What an evaluation asks of a model. `static` and `steered` are traced by `jax.jit`."""

    def texts(
        self, model: nnx.Module, texts: Sequence[str], mesh: Mesh | None = None
    ) -> Float[np.ndarray, "n E"]:
        """Embeddings of captions and prompts; see `inference.batches.Batched` for `mesh`."""

    def instructions(
        self, model: nnx.Module, texts: Sequence[str], mesh: Mesh | None = None
    ) -> Any:
        """What images are steered by, a pytree; `steered` picks from it by number."""

    def static(self, model: nnx.Module, pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B E"]:
        """Embeddings without an instruction."""

    def steered(
        self,
        model: nnx.Module,
        pixels: UInt8[Array, "Q S S 3"],
        rows: Int[Array, " B"],
        states: Any,
        instruction: Int[Array, " B"],
    ) -> Steered:
        """Row b is image `rows[b]` of `pixels` under instruction `instruction[b]` of `states`."""


@runtime_checkable
class Pixels(Protocol):
    """Processed images by number."""

    def __len__(self) -> int:
        """How many there are."""

    def stream(self, indices: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
        """Some of them, in the given order."""


class PixelsInMemory:
    """Images that are held."""

    def __init__(self, pixels: UInt8[np.ndarray, "N S S 3"]):
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def stream(self, indices: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
        """Some of them, in the given order."""
        return (self._pixels[index] for index in indices)


class PixelsOfSource:
    """Images that are read and processed anew for every block, ahead of their use."""

    def __init__(self, source: Source, processor: ImageProcessor, *, workers: int = 0):
        """Args: workers: loading processes; 0 loads in threads."""
        self._source, self._transform = source, _OnlyPixels(processor)
        self._workers = workers

    def __len__(self) -> int:
        return len(self._source)

    def stream(self, indices: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
        """Some of them, in the given order.

        Raises:
          DataError: a record cannot be used; an evaluation leaves none out silently.
        """
        if not len(indices):
            return
        loader = make_eval_loader(
            Subset(self._source, indices),
            self._transform,
            batch_size=min(16, len(indices)),
            num_workers=self._workers,
            host=(0, 1),
            max_bad_fraction=0.0,
        )
        batches = iter(loader)
        try:
            for batch in batches:
                yield from batch["image"][batch["valid"]]
        finally:
            batches.close()


@dataclasses.dataclass(frozen=True)
class _OnlyPixels:
    processor: ImageProcessor

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = image_files.decode(record.image, name=record.id)
        return {"image": self.processor(image).pixels}


def hold(pixels: Pixels) -> PixelsInMemory:
    """All images of a source, read once."""
    return PixelsInMemory(np.stack(list(pixels.stream(np.arange(len(pixels))))))


def blank_image(processor: ImageProcessor) -> UInt8[np.ndarray, "S S 3"]:
    """An image of the processor's mean colour, rounded down as LLaVA does."""
    colour = [int(channel * 255) for channel in processor.mean]
    return np.full((processor.size, processor.size, 3), colour, np.uint8)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """Arrays of one call, and how many of its rows count."""

    pixels: UInt8[np.ndarray, "Q S S 3"]
    rows: Int[np.ndarray, " B"]
    instruction: Int[np.ndarray, " B"]
    count: int


class Galleries:
    """Runs an encoder over images and instructions; every call has one of two shapes.

    On a mesh the rows are split over its batch axes and the images of a step are on every device;
    the model is where the caller has put it.

    Attributes:
      batch_size: rows of a step, a multiple of the mesh's batch shards.
      seconds: that conditioned passes took, reading included, without each block's first step
        (which may compile).
      passes: those passes.
    """

    def __init__(self, encoder: SteeredEncoder, *, batch_size: int, mesh: Mesh | None = None):
        """Raises ConfigError if the mesh does not divide the batch."""
        shards = 1 if mesh is None else mesh_lib.batch_shards(mesh)
        if batch_size < 1 or batch_size % shards:
            raise ConfigError(
                f"batch_size: expected a positive multiple of the {shards} batch shards of the "
                f"mesh, found {batch_size}"
            )
        self.batch_size = batch_size
        self.seconds, self.passes = 0.0, 0
        self._split = None if mesh is None else mesh_lib.batch_sharding(mesh)
        self._whole = None if mesh is None else mesh_lib.replicated(mesh)
        self._mesh = mesh
        self._static = Batched(encoder.static, batch_size=batch_size)
        self._steered = Call(encoder.steered, mesh)

    def width(self, model: nnx.Module, size: int) -> int:
        """Length of an embedding, without running anything. Args: size: image side."""
        row = jax.ShapeDtypeStruct((size, size, 3), np.uint8)
        return self._static.lower(model, row, self._mesh).out_info.shape[1]

    def static(self, model: nnx.Module, pixels: Pixels) -> Float[np.ndarray, "N E"]:
        """All images without an instruction."""
        stream = pixels.stream(np.arange(len(pixels)))
        return self._static.stream(model, in_parts(stream, self.batch_size), self._mesh)

    def steered(
        self,
        model: nnx.Module,
        pixels: Pixels,
        states: Any,
        rows: Rows,
        *,
        images_per_step: int,
        blank: UInt8[np.ndarray, "S S 3"] | None = None,
    ) -> Steered:
        """Rows of images under instructions.

        Args:
          states: from the encoder's `instructions`.
          rows: sorted by image; image number `len(pixels)` is the blank one.
          images_per_step: at least `rows.images_per_step(batch_size)`; a new number compiles anew.
          blank: that image, if a row has it.

        Returns:
          Host arrays, in the order of the rows.
        """
        states = jax.device_put(states, self._whole)
        calls = (
            (self._run(model, states, step), step.count)
            for step in self._steps(pixels, rows, blank, images_per_step)
        )
        with current_mesh(self._mesh):
            found = list(fetched(itertools.islice(calls, 1)))
            start = time.perf_counter()
            found += fetched(calls)
            self.seconds += time.perf_counter() - start
        self.passes += len(rows.image) - found[0][1]
        return Steered(
            embedding=np.concatenate([out.embedding[:count] for out, count in found]),
            presence=np.concatenate([out.presence[:count] for out, count in found]),
        )

    def _run(self, model: nnx.Module, states: Any, step: _Step) -> Any:
        return self._steered(
            model,
            place(step.pixels, self._whole),
            place(step.rows, self._split),
            states,
            place(step.instruction, self._split),
        )

    def _steps(
        self, pixels: Pixels, rows: Rows, blank: np.ndarray | None, images_per_step: int
    ) -> Iterator[_Step]:
        """Reads each image once and keeps it while consecutive steps use it."""
        images = rows.images()
        stream = itertools.chain(pixels.stream(images[images < len(pixels)]), [blank])
        held: dict[int, np.ndarray] = {}
        for start in range(0, len(rows.image), self.batch_size):
            part = slice(start, start + self.batch_size)
            wanted, position = np.unique(rows.image[part], return_inverse=True)
            held = {k: held[k] if k in held else next(stream) for k in wanted.tolist()}
            yield _Step(
                pixels=fill(list(held.values()), images_per_step),
                rows=fill(position.astype(np.int32), self.batch_size),
                instruction=fill(rows.instruction[part].astype(np.int32), self.batch_size),
                count=len(position),
            )
