"""Features of images, computed once and kept in a folder.

`features.npy` holds those of all images, float16[N, P, C], `index.json` the records that they
belong to, a checksum of each record's images, and how they were made. Letters: N images, P features
of an image, C their width, M images of a record, S their side.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, Float16, UInt8

from perception_jax.errors import DataError
from perception_jax.files import write_whole

ARRAY, INDEX = "features.npy", "index.json"
"""Names of the files."""


class KeptFeatures:
    """Features of the images of records, read when they are used; picklable.

    Attributes:
      folder: where they lie.
      shape: (P, C) of an image.
      made: how they were computed, as `FeaturesWriter` got it.
    """

    def __init__(self, folder: pathlib.Path | str):
        """Reads the index.

        Raises:
          DataError: files that are missing, damaged or do not belong together.
        """
        self.folder = pathlib.Path(folder)
        index = _read_index(self.folder / INDEX)
        ids, counts, images = index["ids"], index["counts"], index["images"]
        self.made = index["made"]
        if sum(counts) > len(self._array) or not len(ids) == len(counts) == len(images):
            raise DataError(
                f"{self.folder}: expected the features of {sum(counts)} images of {len(counts)} "
                f"records, found {len(self._array)}, {len(ids)} names and {len(images)} checksums. "
                "Compute them again."
            )
        self._images = dict(zip(ids, images, strict=True))
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

    def compare(self, identity: str, images: UInt8[np.ndarray, "M S S 3"]) -> None:
        """Makes sure that a record's features are those of these images, if any are kept.

        Args:
          images: as they were encoded, after resizing.

        Raises:
          DataError: they are of others.
        """
        if identity in self._images and self._images[identity] != _checksum(images):
            raise DataError(
                f"{self.folder}: expected features of the images of record {identity!r}, found "
                "those of others: the images have changed since. Delete the folder, or name "
                "another one."
            )

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


class FeaturesWriter:
    """Writes features of records into a folder, the index last, so that a folder with one is whole.

    A context manager; features that lie in the folder are replaced. What it raises names the
    record: images of another shape than those before, numbers that float16 lacks, a record that
    comes twice, a disk that refuses (all `DataError`).
    """

    def __init__(self, folder: pathlib.Path | str, made: Mapping[str, Any]):
        """Args: made: how the features are computed, for the index; JSON values."""
        self.folder = pathlib.Path(folder)
        self._made = dict(made)
        self._counts: dict[str, int] = {}
        self._images: dict[str, int] = {}
        self._shape: tuple[int, ...] | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> FeaturesWriter:
        with self._naming_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / INDEX).unlink(missing_ok=True)
            self._file = (self.folder / ARRAY).open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        # Without an index what is still buffered is of no use; `add` has named the disk's error.
        with contextlib.suppress(OSError):
            self._file.close()

    def add(
        self,
        identity: str,
        own: Float[np.ndarray, "M P C"],
        images: UInt8[np.ndarray, "M S S 3"],
    ) -> None:
        """Appends the features of a record's images. Args: images: as they were encoded."""
        if identity in self._counts:
            raise DataError(f"features: record {identity!r} comes twice.")
        if self._shape is None:
            self._shape = own.shape[1:]
            self._write_header(0)
        if own.shape[1:] != self._shape:
            raise DataError(
                f"features of record {identity!r}: expected {list(self._shape)} for each image, "
                f"found {list(own.shape[1:])}."
            )
        largest = float(np.abs(own).max(initial=0.0))
        if not largest <= float(np.finfo(np.float16).max):
            raise DataError(
                f"features of record {identity!r}: expected numbers within float16, found "
                f"{largest}."
            )
        with self._naming_errors():
            self._file.write(own.astype(np.float16).tobytes())
        self._counts[identity], self._images[identity] = len(own), _checksum(images)

    def finish(self) -> KeptFeatures:
        """Writes the index.

        Raises:
          DataError: there are no features.
        """
        if self._shape is None:
            raise DataError(f"{self.folder}: expected features of some images, found none.")
        with self._naming_errors():
            self._file.seek(0)
            self._write_header(sum(self._counts.values()))
            self._file.close()
            index = {
                "made": self._made,
                "ids": list(self._counts),
                "counts": list(self._counts.values()),
                "images": list(self._images.values()),
            }
            write_whole(self.folder / INDEX, json.dumps(index))
        return KeptFeatures(self.folder)

    def _write_header(self, images: int) -> None:
        # numpy leaves room in it for the first axis to grow, so that it can be written again.
        header = {"descr": "<f2", "fortran_order": False, "shape": (images, *self._shape)}
        with self._naming_errors():
            np.lib.format.write_array_header_1_0(self._file, header)

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.folder}: features cannot be written ({error}).") from error


def _read_index(path: pathlib.Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: expected the index of kept features, found none that can be read ({error}). "
            "Was their computation interrupted? Start it again."
        ) from error
    kinds = {"ids": list, "counts": list, "images": list, "made": dict}
    good = isinstance(index, dict) and all(isinstance(index.get(k), v) for k, v in kinds.items())
    if not good or not all(isinstance(n, int) and n >= 0 for n in index["counts"]):
        raise DataError(
            f"{path}: expected lists of ids, counts and images, found something else. Compute the "
            "features again."
        )
    return index


def _checksum(images: UInt8[np.ndarray, "M S S 3"]) -> int:
    return zlib.crc32(np.ascontiguousarray(images), len(images))
