"""Two-stage retrieval: static features find candidates, conditioned ones put them in order.

Conditioned features depend on the instruction, so ranking n images for q instructions costs n times
q encoder passes; here it is `top` a query. Letters: N images, E width, k found.
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
    instructions: Any,
    instruction: int,
    *,
    top: int = 100,
) -> Neighbours:
    """The images that fit a text best, best first.

    Args:
      encode: of `ConditionedEncoder.conditioned`.
      static: embeddings of all images without an instruction, computed once.
      query: embedding of the text.
      instructions, instruction: features of instructions, and the number of one of them.
      top: candidates that are encoded again.

    Returns:
      Indices and conditioned cosines, both [1, k] with k = min(top, N). Equal cosines stand in the
      order of the images.
    """
    candidates = np.sort(nearest(query[None], static, min(top, len(pixels))).indices[0])
    pairs = ImageTextPairs(candidates, np.full(len(candidates), instruction))
    out = encode(model, pixels, instructions, pairs, images_per_call=encode.batch_size)
    found = nearest(query[None], np.asarray(out.embedding), len(candidates))
    return Neighbours(candidates[found.indices], found.scores)
