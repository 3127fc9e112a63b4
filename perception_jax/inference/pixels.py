"""Processed images by number, in memory or read from a source when they are needed.

Letters: N images, S image side, n chosen images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from perception_jax.data import images as image_files
from perception_jax.data.loader import make_eval_loader
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Record, Source
from perception_jax.data.sources.combine import Subset


@runtime_checkable
class Pixels(Protocol):
    """Protocol of processed images by number."""

    def __len__(self) -> int:
        """The number of images."""

    def stream(self, indices: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
        """Yields some images in the given order."""


class PixelsInMemory:
    """Processed images in one array."""

    def __init__(self, pixels: UInt8[np.ndarray, "N S S 3"]):
        self._pixels = pixels

    @classmethod
    def of(cls, pixels: Pixels) -> PixelsInMemory:
        """Reads all images once."""
        return cls(np.stack(list(pixels.stream(np.arange(len(pixels))))))

    def __len__(self) -> int:
        return len(self._pixels)

    def stream(self, indices: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
        """Yields some images in the given order."""
        return (self._pixels[index] for index in indices)


class PixelsOfSource:
    """Images of a source, read and processed anew for each stream, ahead of their use."""

    def __init__(self, source: Source, processor: ImageProcessor, *, workers: int = 0):
        """Args: workers: loading processes; 0 loads in threads."""
        self._source, self._transform = source, _ImageTransform(processor)
        self._workers = workers

    def __len__(self) -> int:
        return len(self._source)

    def stream(self, indices: Int[np.ndarray, " n"]) -> Iterator[UInt8[np.ndarray, "S S 3"]]:
        """Yields some images in the given order.

        Raises:
          DataError: a record cannot be used; none is left out silently.
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
class _ImageTransform:
    processor: ImageProcessor

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = image_files.decode(record.image, name=record.id)
        return {"image": self.processor(image).pixels}


def blank_image(processor: ImageProcessor) -> UInt8[np.ndarray, "S S 3"]:
    """An image of the processor's mean colour, rounded down as LLaVA does."""
    colour = [int(channel * 255) for channel in processor.mean]
    return np.full((processor.size, processor.size, 3), colour, np.uint8)
