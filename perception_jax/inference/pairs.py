"""A function of a model over pairs of an image and a text: calls of one shape that share images.

A call gets Q images and B pairs that point into them, so that pairs of one image read, process and
transfer it once. Letters: S image side, p pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from perception_jax.inference.batches import (
    CompiledPerMesh,
    current_mesh,
    divisible,
    fetched,
    fill,
    joined,
    place,
)
from perception_jax.inference.pixels import Pixels
from perception_jax.shard.mesh import batch_sharding, mesh_of, replicated


@dataclasses.dataclass(frozen=True, eq=False)
class ImageTextPairs:
    """Pairs of an image and a text by number, sorted by image.

    Attributes:
      image: numbers of the images; one more than the last stands for an extra image.
      text: numbers of the texts.
    """

    image: Int[np.ndarray, " p"]
    text: Int[np.ndarray, " p"]

    def images(self) -> Int[np.ndarray, " n"]:
        """The distinct images, ascending."""
        return np.unique(self.image)

    def images_per_call(self, batch_size: int) -> int:
        """Largest number of distinct images in a call of `batch_size` consecutive pairs."""
        new = np.diff(self.image, prepend=-1) != 0
        new[::batch_size] = True
        return int(np.add.reduceat(new, np.arange(0, len(new), batch_size)).max(initial=1))


class BatchedPairs(CompiledPerMesh):
    """A compiled function of a model over any number of pairs of an image and a text.

    The function gets the model, uint8[Q, S, S, 3] images, int32[B] positions in them, the texts
    (any pytree) and int32[B] numbers of texts; it gives a pytree of arrays with B rows each. On a
    mesh the pairs are split over the batch axes; the images of a call, the texts and the results
    are on every device.

    Attributes:
      batch_size: pairs of a call; on a mesh, the next multiple of its batch shards.
      seconds: duration of all calls, reading included, without the first call of each run, which
        may compile.
      timed: number of pairs in these calls.
    """

    seconds, timed = 0.0, 0

    def __call__(
        self,
        model: Any,
        images: Pixels,
        texts: Any,
        pairs: ImageTextPairs,
        *,
        images_per_call: int,
        extra: UInt8[np.ndarray, "S S 3"] | None = None,
        mesh: Mesh | None = None,
    ) -> Any:
        """Computes the results of all pairs as numpy arrays, in their order.

        Args:
          images_per_call: at least `pairs.images_per_call(batch_size)`; another number compiles
            anew.
          extra: image number `len(images)`, if a pair has it.
          mesh: None takes the one that the model lies on, if any.

        Raises:
          DataError: no pairs.
        """
        mesh = mesh or mesh_of(model)
        size, run = divisible(self.batch_size, mesh), self._on(mesh)
        split, whole = (None, None) if mesh is None else (batch_sharding(mesh), replicated(mesh))
        texts = jax.device_put(texts, whole)
        calls = (
            (run(model, place(some, whole), place(at, split), texts, place(text, split)), count)
            for some, at, text, count in _calls(images, pairs, extra, size, images_per_call)
        )
        with current_mesh(mesh):
            first = list(fetched(itertools.islice(calls, 1)))
            start = time.perf_counter()
            rest = list(fetched(calls))
            self.seconds += time.perf_counter() - start
        self.timed += sum(count for _, count in rest)
        return joined(first + rest)


def _calls(
    images: Pixels, pairs: ImageTextPairs, extra: np.ndarray | None, size: int, most: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Images, positions in them and texts of each call, and how many of its pairs count.

    Reads each image once and keeps it while consecutive calls use it.
    """
    numbers = pairs.images()
    stream = itertools.chain(images.stream(numbers[numbers < len(images)]), [extra])
    read: dict[int, np.ndarray] = {}
    for start in range(0, len(pairs.image), size):
        part = slice(start, start + size)
        wanted, position = np.unique(pairs.image[part], return_inverse=True)
        read = {k: read[k] if k in read else next(stream) for k in wanted.tolist()}
        at, text = (x.astype(np.int32) for x in (position, pairs.text[part]))
        yield fill(list(read.values()), most), fill(at, size), fill(text, size), len(position)
