"""Many images or texts to unit vectors, in fixed-size batches so that nothing recompiles.

Letters: B batch, S image side, T text tokens, E embedding width, N all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Shaped, UInt8

from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import PaddedTokenizer
from perception_jax.inference.batches import Batched, divisible
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import unit
from perception_jax.shard.mesh import mesh_of
from perception_jax.version import __version__

Embeddings = Mapping[str, Float[np.ndarray, " E"]]
"""The unit vector of each image or text by its id."""

_BATCHES_AT_ONCE = 4
"""Batches between which `Encoder.embed` hands on what it has."""


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images to embed.

    Attributes:
      ids: one of each image, unique among all that are embedded together.
      pixels: processed images.
    """

    ids: tuple[str, ...]
    pixels: UInt8[np.ndarray, "N S S 3"]


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts to embed."""

    texts: tuple[str, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """The text itself, marked as one."""
        return tuple(f"text: {text}" for text in self.texts)


def take(embeddings: Embeddings, inputs: Images | Texts) -> Float[np.ndarray, "N E"]:
    """The embeddings of some inputs, in their order."""
    return np.stack([embeddings[name] for name in inputs.ids])


class Encoder:
    """Embeds with the model given at each call; compiled once per model shape.

    Attributes:
      processor: gives mean and standard deviation; images passed in are already of its size.
      tokenizer: of the texts.
      batch_size: rows of a call; the last call is padded.
    """

    def __init__(
        self, processor: ImageProcessor, tokenizer: PaddedTokenizer, *, batch_size: int = 64
    ):
        self.processor = processor
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._image = Batched(self._embed_images, batch_size=batch_size)
        self._text = Batched(_embed_texts, batch_size=batch_size)

    def images(
        self,
        model: nnx.Module,
        pixels: UInt8[np.ndarray, "N S S 3"],
        mesh: Mesh | None = None,
    ) -> Float[np.ndarray, "N E"]:
        """Unit vectors of processed images; see `Batched` for `mesh`."""
        return self._image(model, pixels, mesh)

    def texts(
        self, model: nnx.Module, texts: Sequence[str], mesh: Mesh | None = None
    ) -> Float[np.ndarray, "N E"]:
        """Unit vectors of texts; see `Batched` for `mesh`."""
        return self._text(model, self._rows(Texts(tuple(texts))), mesh)

    def embed(
        self,
        model: nnx.Module,
        inputs: Sequence[Images | Texts],
        mesh: Mesh | None = None,
        *,
        only: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Float[np.ndarray, " E"]]]:
        """Yields the id and the unit vector of each input, a few batches at a time.

        Args:
          inputs: in this order; an id that comes again is embedded once.
          only: the ids that are wanted; all by default.
        """
        known: set[str] = set()
        for one in inputs:
            run = self._text if isinstance(one, Texts) else self._image
            rows, ids = self._rows(one), np.array(one.ids, object)
            left = []
            for k, name in enumerate(one.ids):
                if name not in known and (only is None or name in only):
                    left.append(k)
                known.add(name)
            size = _BATCHES_AT_ONCE * divisible(self.batch_size, mesh or mesh_of(model))
            for start in range(0, len(left), size):
                part = left[start : start + size]
                yield from zip(ids[part], run(model, rows[part], mesh), strict=True)

    def fingerprint(self, inputs: Sequence[Images | Texts], settings: str = "") -> str:
        """16 hexadecimal digits for all but the weights that embeddings depend on.

        These are ids, pixels, tokens, normalisation, the library's version and `settings`.
        """
        normalisation = (self.processor.mean, self.processor.std)
        digest = hashlib.sha256(repr((__version__, normalisation, settings)).encode())
        for one in inputs:
            rows = np.ascontiguousarray(self._rows(one))
            digest.update(repr((one.ids, rows.shape, rows.dtype.str)).encode())
            digest.update(rows.data)
        return digest.hexdigest()[:16]

    def _rows(self, inputs: Images | Texts) -> Shaped[np.ndarray, "N ..."]:
        if isinstance(inputs, Texts):
            return np.asarray(self.tokenizer(inputs.texts).ids)
        return inputs.pixels

    def _embed_images(
        self, model: nnx.Module, pixels: UInt8[Array, "B S S 3"]
    ) -> Float[Array, "B E"]:
        normal = normalise(pixels, self.processor.mean, self.processor.std)
        return unit(model.vision(normal).embedding)


def _embed_texts(model: nnx.Module, ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
    return unit(model.text(ids).embedding)
