"""Embeds the images of a folder part by part; what is there of a stopped run is kept.

Letters: N images, B batch, S image side, E embedding width.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, UInt8

from perception_jax.api import Loaded
from perception_jax.data import pixel_budget
from perception_jax.errors import DataError, ImageError
from perception_jax.files import replacing
from perception_jax.inference.batches import Batched
from perception_jax.interop.fingerprint import fingerprint
from perception_jax.models.params import flatten
from perception_jax.nn.towers import TwoTowers
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import unit
from perception_jax.version import __version__

PART = 1024
"""Images of a file."""

_log = logging.getLogger(__name__)


class ImageEmbedder:
    """Gives images the embedding of an encoder, scaled to length 1, in float32.

    Of a model with two towers it is that of the joint space; of an image tower alone its own, e.g.
    of DINOv2 the class token behind the final norm.
    """

    def __init__(self, loaded: Loaded, *, batch: int = 64, mesh: Mesh | None = None):
        """Compiles nothing yet. Args: batch: images of a call. mesh: devices that share it."""
        self.processor, self._model, self._mesh = loaded.processor.image, loaded.model, mesh
        self._run = Batched(self._embed, batch_size=batch)

    def __call__(self, pixels: UInt8[np.ndarray, "N S S 3"]) -> Float32[np.ndarray, "N E"]:
        """Embeds processed images.

        Raises:
          DataError: an embedding is not finite, or there are no images.
        """
        found = self._run(self._model, pixels, self._mesh)
        if not np.isfinite(found).all():
            row = int(np.argwhere(~np.isfinite(found))[0, 0])
            raise DataError(f"expected finite embeddings, found others for image {row} of a part.")
        return found

    def fingerprint(self) -> str:
        """16 hexadecimal digits for weights, processor and version of the library."""
        weights = fingerprint(flatten(self._model), exact=True)
        text = repr((__version__, weights, self.processor, type(self._model).__name__))
        offset = getattr(self._model, "position_offset", None)
        return hashlib.sha256(f"{text} {offset}".encode()).hexdigest()[:16]

    def _embed(self, model: nnx.Module, pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B E"]:
        tower = model.vision if isinstance(model, TwoTowers) else model
        normal = normalise(pixels, self.processor.mean, self.processor.std)
        with exact():
            out = tower(normal)
        found = out.pooled if out.embedding is None else out.embedding
        return unit(found.astype(jax.numpy.float32))


def exact() -> contextlib.AbstractContextManager[None]:
    """A context that multiplies float32 as such; TPUs and GPUs would round the factors."""
    return jax.default_matmul_precision("highest")


def embed_images(
    embedder: ImageEmbedder,
    images: Sequence[pathlib.Path],
    folder: pathlib.Path,
    *,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] | None = None,
    title: str = "",
) -> Float32[np.ndarray, "N E"] | None:
    """Embeds image files into `folder/<fingerprint>/part-00000.npy` and so on.

    An image that cannot be read is named in the log and gets a row of NaN.

    Args:
      share: index and number of the processes that share the parts.
      wait: returns once the other processes have written theirs.
      title: of the progress bar.

    Returns:
      The embeddings of all images, or None if other processes have not written theirs yet.

    Raises:
      DataError: a part cannot be read, no image can be read, or an embedding is not finite.
    """
    import tqdm

    folder = folder / _key(embedder, images)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        (folder / f"part-{k:05d}.npy", images[start : start + PART])
        for k, start in enumerate(range(0, len(images), PART))
    ]
    own = [part for part in parts[share[0] :: share[1]] if not part[0].exists()]
    hidden = not sys.stderr.isatty()
    total = sum(len(some) for _, some in own)
    with tqdm.tqdm(
        desc=title, total=total, unit="image", dynamic_ncols=True, disable=hidden
    ) as bar:
        for (path, some), pixels in zip(own, _read_ahead(embedder, own), strict=True):
            _write(path, _embedded(embedder, pixels))
            bar.update(len(some))
    if wait is not None:
        wait()
    if not all(path.exists() for path, _ in parts):
        return None
    found = [_read(path, len(some)) for path, some in parts]
    width = next((one.shape[1] for one in found if one.shape[1]), 0)
    if not width:
        raise DataError(
            f"none of {len(images)} images could be read; the log names the first ones."
        )
    return np.concatenate(
        [one if one.shape[1] else np.full((len(one), width), np.nan, np.float32) for one in found]
    )


def _key(embedder: ImageEmbedder, images: Sequence[pathlib.Path]) -> str:
    """Names the embeddings of an encoder for files of these names, sizes and times of change."""
    digest = hashlib.sha256(embedder.fingerprint().encode())
    for image in images:
        status = image.stat()
        digest.update(f"{image}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _embedded(
    embedder: ImageEmbedder, read: Sequence[UInt8[np.ndarray, "S S 3"] | None]
) -> Float32[np.ndarray, "N _"]:
    """Embeddings of a part; without columns if none of its images can be read."""
    good = [k for k, pixels in enumerate(read) if pixels is not None]
    if not good:
        return np.zeros((len(read), 0), np.float32)
    vectors = embedder(np.stack([read[k] for k in good]))
    found = np.full((len(read), vectors.shape[1]), np.nan, np.float32)
    found[good] = vectors
    return found


def _read_ahead(
    embedder: ImageEmbedder, parts: Sequence[tuple[pathlib.Path, Sequence[pathlib.Path]]]
) -> Iterator[list[UInt8[np.ndarray, "S S 3"] | None]]:
    """Processed images of each part, read in threads while the part before is embedded; None for an
    image that cannot be read."""

    def read(image: pathlib.Path) -> np.ndarray | None:
        try:
            with pixel_budget.scope():
                return embedder.processor.read(image).pixels
        except ImageError as error:
            _log.warning("skipped %s", error)
            return None

    pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        waiting: list[list[concurrent.futures.Future]] = []
        for _, images in parts:
            waiting.append([pool.submit(read, image) for image in images])
            if len(waiting) > 1:
                yield [future.result() for future in waiting.pop(0)]
        for futures in waiting:
            yield [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)


def _write(path: pathlib.Path, vectors: np.ndarray) -> None:
    with replacing(path) as file:
        np.save(file, vectors, allow_pickle=False)


def _read(path: pathlib.Path, rows: int) -> Float32[np.ndarray, "N _"]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Delete it and run again.") from error
    if found.ndim != 2 or len(found) != rows:
        raise DataError(
            f"{path}: expected {rows} rows, found shape {found.shape}. Delete it and run again."
        )
    return found
