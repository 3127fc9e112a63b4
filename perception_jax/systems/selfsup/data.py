"""Two augmented views of each image, and which of their patches show the same.

Letters: N images of a record, S image side, G patches along a side, P = G × G.
"""

from __future__ import annotations

import dataclasses

import grain
import numpy as np
from jaxtyping import Bool, Int32

from perception_jax.data import images, records
from perception_jax.data.augment import ImageAugment, Window
from perception_jax.data.loader import Examples, RecordExamples, make_loader
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Source
from perception_jax.data.skipping import MAX_BAD_FRACTION
from perception_jax.data.views import require_square
from perception_jax.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TwoViews:
    """Every image of a record twice, each time augmented, and the mirror images of both if asked.

    Gives "image" and "second_image" (uint8[N, S, S, 3]), and for each patch of the first image's
    first view the number of the patch of its second view that shows its middle: "match_index"
    (int32[P]) and "match_mask" (bool[P]), whether there is one. Warps are small and not followed.

    Attributes:
      grid: patches along a side.
      images: how many images a record has.
      mirrored: whether each image is followed by its mirror image, with the same changes.
    """

    processor: ImageProcessor
    augment: ImageAugment
    grid: int
    images: int = 1
    mirrored: bool = False

    def __post_init__(self) -> None:
        require_square(self.processor)

    @property
    def rows(self) -> int:
        """N, images of a record together with their mirror images."""
        return self.images * (2 if self.mirrored else 1)

    def __call__(self, record: records.Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """See the class.

        Raises:
          DataError: another number of images, or one that cannot be decoded.
        """
        if len(record.images) != self.images:
            raise DataError(
                f"{record.id}: expected {self.images} images, found {len(record.images)}."
            )
        views: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        windows: list[Window] = []
        for image in record.images:
            # The processor comes first, so that windows are those of what the model can see.
            whole = self.processor(images.decode(image, name=record.id)).pixels
            for shown in views:
                view, window = self.augment.view(whole, rng)
                shown += [view, view[:, ::-1]] if self.mirrored else [view]
                windows.append(window)
        index, mask = matches(windows[0], windows[1], self.grid)
        first, second = (np.stack(shown) for shown in views)
        return {"image": first, "second_image": second, "match_index": index, "match_mask": mask}


def matches(
    first: Window, second: Window, grid: int
) -> tuple[Int32[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
    """For each patch of the first window the patch of the second in which its middle lies, and
    whether it lies in the second at all."""
    middles = (np.arange(grid) + 0.5) / grid
    places = [
        np.floor((first[axis] + middles * first[2 + axis] - second[axis]) / second[2 + axis] * grid)
        for axis in (0, 1)
    ]
    inside = [(place >= 0) & (place < grid) for place in places]
    columns, rows = (np.clip(place, 0, grid - 1).astype(np.int32) for place in places)
    index = rows[:, None] * np.int32(grid) + columns[None]
    return index.ravel(), (inside[1][:, None] & inside[0][None]).ravel()


class ViewData:
    """Records of a source as batches of two views."""

    tokenizer = None
    """There are no texts."""

    def __init__(
        self,
        source: Source,
        transform: TwoViews,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        max_bad_fraction: float = MAX_BAD_FRACTION,
    ):
        """Opens nothing yet.

        Args:
          batch_size: rows of the global batch.
          seed: of the data order and of the views.
          workers: data-loading processes; 0 loads in the main process.
          max_bad_fraction: of records that may be skipped; see `data.skipping`.
        """
        self.transform, self.batch_size = transform, batch_size
        self._source, self._seed, self._workers = source, seed, workers
        self._max_bad_fraction = max_bad_fraction

    def examples(self, seed: int) -> Examples:
        """The training records, each with the arrays that the model gets of it."""
        return RecordExamples(self._source, self.transform, seed)

    def loader(self) -> grain.IterDataset:
        """This host's part of each batch, without end; see `TwoViews`."""
        return make_loader(
            self._source,
            self.transform,
            batch_size=self.batch_size,
            seed=self._seed,
            num_workers=self._workers,
            max_bad_fraction=self._max_bad_fraction,
        )
