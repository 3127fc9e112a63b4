"""Two-stage retrieval: image features find candidates, features of (image, text) pairs rank them.

Features that depend on a text (an instruction) cost n times q encoder passes for n images and q
texts; here it is `top` a query. Letters: N images, E width, k found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Float

from perception_jax.evals.ranking import Neighbours, nearest
from perception_jax.inference.pairs import BatchedPairs, ImageTextPairs
from perception_jax.inference.pixels import Pixels


def search(
    encode: BatchedPairs,
    model: nnx.Module,
    pixels: Pixels,
    static: Float[np.ndarray, "N E"],
    query: Float[np.ndarray, " E"],
    texts: Any,
    text: int,
    *,
    top: int = 100,
) -> Neighbours:
    """Finds the images that fit a query best, best first.

    Args:
      encode: gives pairs an `embedding`.
      static: embeddings of all images by themselves, computed once.
      query: embedding of the query.
      texts, text: the texts that `encode` takes, and the number of the one to use.
      top: candidates that are encoded again.

    Returns:
      Indices and their cosines, both [1, k] with k = min(top, N). Equal cosines stand in the
      order of the images.
    """
    candidates = np.sort(nearest(query[None], static, min(top, len(pixels))).indices[0])
    pairs = ImageTextPairs(candidates, np.full(len(candidates), text))
    out = encode(model, pixels, texts, pairs, images_per_call=encode.batch_size)
    found = nearest(query[None], np.asarray(out.embedding), len(candidates))
    return Neighbours(candidates[found.indices], found.scores)
