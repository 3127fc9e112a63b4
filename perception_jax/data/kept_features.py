"""Features of images, computed once and kept in a folder.

`features.npy` holds those of all images, float16[N, P, C], `index.json` the records that they
belong to and how they were made. Letters: N images, P features of an image, C their width, M images
of a record.
"""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Float16

from perception_jax.errors import DataError
from perception_jax.files import write_whole

ARRAY, INDEX = "features.npy", "index.json"
"""Names of the files."""


class KeptFeatures:
    """Features of the images of records, read when they are used; picklable.

    Attributes:
      folder: where they lie.
      shape: (P, C) of an image.
      made: how they were computed, as `keep` got it.
    """

    def __init__(self, folder: pathlib.Path | str):
        """Reads the index.

        Raises:
          DataError: files that are missing, damaged or do not belong together.
        """
        self.folder = pathlib.Path(folder)
        index = _read_index(self.folder / INDEX)
        ids, counts = index["ids"], index["counts"]
        self.made = index["made"]
        if sum(counts) > len(self._array) or len(ids) != len(counts):
            raise DataError(
                f"{self.folder}: expected the features of {sum(counts)} images of {len(counts)} "
                f"records, found {len(self._array)} and {len(ids)} names. Compute them again."
            )
        ends = np.cumsum(counts).tolist()
        starts = (end - count for end, count in zip(ends, counts, strict=True))
        self._places = dict(zip(ids, zip(starts, ends, strict=True), strict=True))
        self.shape = self._array.shape[1:]

    def __reduce__(self) -> tuple[type, tuple[pathlib.Path]]:
        return KeptFeatures, (self.folder,)

    def __getitem__(self, identity: str) -> Float16[np.ndarray, "M P C"]:
        """The features of a record's images.

        Raises:
          DataError: none are kept.
        """
        if identity not in self._places:
            raise DataError(
                f"{self.folder}: expected features of record {identity!r}, found none. Were they "
                "computed for other records? Delete the folder, or name another one."
            )
        start, end = self._places[identity]
        return np.asarray(self._array[start:end])

    @functools.cached_property
    def _array(self) -> Float16[np.ndarray, "N P C"]:
        path = self.folder / ARRAY
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: not a .npy file that can be read ({error}).") from error
        if found.ndim != 3 or found.dtype != np.float16:
            raise DataError(
                f"{path}: expected float16[N, P, C], found {found.dtype}{list(found.shape)}."
            )
        return found


def keep(
    folder: pathlib.Path | str,
    features: Iterable[tuple[str, Float[np.ndarray, "_ P C"]]],
    *,
    most: int,
    made: Mapping[str, Any],
) -> KeptFeatures:
    """Writes features of records, the index last, so that a folder with one is whole.

    Args:
      folder: made if it is missing; features that lie there are replaced.
      features: of each record, by its id.
      most: images of all records; the file has room for them, and fewer may come.
      made: how, for the index; JSON values.

    Raises:
      DataError: no images or more than `most`, features of another shape, numbers that float16
        lacks, a record that comes twice, or a disk that refuses.
    """
    folder = pathlib.Path(folder)
    counts: dict[str, int] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)
        array, filled = None, 0
        for identity, own in features:
            if array is None:
                shape = (most, *own.shape[1:])
                array = np.lib.format.open_memmap(folder / ARRAY, "w+", np.float16, shape)
            _check(identity, own, array, filled, counts)
            array[filled : filled + len(own)] = own
            counts[identity] = len(own)
            filled += len(own)
        if array is None:
            raise DataError(f"{folder}: expected features of some images, found none.")
        array.flush()
        index = {"made": dict(made), "ids": list(counts), "counts": list(counts.values())}
        write_whole(folder / INDEX, json.dumps(index))
    except OSError as error:
        raise DataError(f"{folder}: features cannot be written ({error}).") from error
    return KeptFeatures(folder)


def _check(
    identity: str, own: np.ndarray, array: np.ndarray, filled: int, counts: Mapping[str, int]
) -> None:
    if identity in counts:
        raise DataError(f"features: record {identity!r} comes twice.")
    if own.shape[1:] != array.shape[1:] or filled + len(own) > len(array):
        raise DataError(
            f"features of record {identity!r}: expected {list(array.shape[1:])} for each of "
            f"{len(array)} images, found {list(own.shape[1:])} for {filled + len(own)}."
        )
    largest = float(np.abs(own).max(initial=0.0))
    if not largest <= float(np.finfo(np.float16).max):
        raise DataError(
            f"features of record {identity!r}: expected numbers within float16, found {largest}."
        )


def _read_index(path: pathlib.Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected the index of kept features, found none that can be read ({error}). "
            "Was their computation interrupted? Start it again."
        ) from error
    kinds = {"ids": list, "counts": list, "made": dict}
    good = isinstance(index, dict) and all(isinstance(index.get(k), v) for k, v in kinds.items())
    if not good or not all(isinstance(n, int) and n >= 0 for n in index["counts"]):
        raise DataError(f"{path}: expected lists of ids and counts, found something else.")
    return index
