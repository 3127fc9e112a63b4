"""Batches from images that fit in memory: every image processed once, every caption tokenised once.

The same rows as `ClassGroups` gives one by one, put together by numpy alone: hundreds of batches a
second where reading rows makes a few.
"""

from __future__ import annotations

import concurrent.futures
import os

import grain
import jax
import numpy as np

from perception_jax.data import images, pixel_budget, workers
from perception_jax.data.records import Source
from perception_jax.systems.give.data.rows import NUMBERS, GroupTransform, mirrored, model_boxes
from perception_jax.systems.give.data.sampler import BATCHES, BatchPlanner


class HeldBatches:
    """Batch number → its arrays, for `grain` to map over numbers."""

    def __init__(
        self,
        source: Source,
        planner: BatchPlanner,
        transform: GroupTransform,
        *,
        host: tuple[int, int] | None = None,
    ):
        """Reads all of `source`.

        Args:
          host: this host's number and how many there are; None asks JAX.

        Raises:
          ImageError: an image cannot be decoded.
        """
        self._planner = planner
        self._host, self._hosts = host or (jax.process_index(), jax.process_count())

        def read(index: int) -> tuple[str, np.ndarray, np.ndarray]:
            with pixel_budget.scope():
                record = source[index]
                shown = transform.processor(images.decode(record.image, name=record.id))
                return record.id, shown.pixels, model_boxes(record, shown)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            names, pixels, boxes = zip(*pool.map(read, range(len(source))), strict=True)
        self._ids, self._pixels = np.array(names), np.stack(pixels)
        self._size = transform.processor.size
        self._boxes = np.concatenate(boxes)
        self._first_box = np.cumsum([0, *map(len, boxes)])[:-1]
        self._texts = transform.texts(planner.index.captions)

    def __call__(self, batch: int) -> dict[str, np.ndarray]:
        """This host's rows of a batch: the arrays of `GroupTransform`, and "id"."""
        plan = self._planner.plan(*divmod(int(batch), self._planner.batches_per_epoch))
        own = slice(self._host, None, self._hosts)
        image, flip = plan.image[own], plan.flip[own]
        pixels = self._pixels[image]
        pixels[flip] = pixels[flip, :, ::-1]
        boxes = self._boxes[self._first_box[image] + plan.object[own]]
        caption = plan.caption[own]
        return {
            "image": pixels,
            **{key: getattr(plan, name)[own] for key, name in NUMBERS.items()},
            "boxes": mirrored(boxes, self._size, flip)[:, None],
            "box_mask": boxes[:, [2]] > boxes[:, [0]],
            **{name: values[caption] for name, values in self._texts.items()},
            "id": self._ids[image],
        }

    def dataset(self) -> grain.IterDataset:
        """All batches in order; iterators resume by their number."""
        workers.settle_grain()
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return grain.MapDataset.range(BATCHES).map(self).to_iter_dataset(options)
