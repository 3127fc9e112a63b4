"""Many images or texts to unit vectors, in fixed-size batches so that nothing recompiles.

Letters: B batch, S image side, T text tokens, E embedding width, N all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from perception_jax.data.processors import ImageProcessor
from perception_jax.data.tokenization import PaddedTokenizer
from perception_jax.inference.batches import Batched
from perception_jax.ops.image import normalise
from perception_jax.ops.losses import unit


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
        return self._text(model, np.asarray(self.tokenizer(texts).ids), mesh)

    def _embed_images(
        self, model: nnx.Module, pixels: UInt8[Array, "B S S 3"]
    ) -> Float[Array, "B E"]:
        normal = normalise(pixels, self.processor.mean, self.processor.std)
        return unit(model.vision(normal).embedding)


def _embed_texts(model: nnx.Module, ids: Int[Array, "B T"]) -> Float[Array, "B E"]:
    return unit(model.text(ids).embedding)
