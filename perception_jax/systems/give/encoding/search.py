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
from perception_jax.systems.give.encoding.galleries import Galleries, Pixels
from perception_jax.systems.give.encoding.plan import Rows


def search(
    galleries: Galleries,
    model: nnx.Module,
    pixels: Pixels,
    static: Float[np.ndarray, "N E"],
    query: Float[np.ndarray, " E"],
    states: Any,
    instruction: int,
    *,
    top: int = 100,
) -> Neighbours:
    """The images that fit a text best, best first.

    Args:
      static: embeddings of all images without an instruction, computed once.
      query: embedding of the text.
      states, instruction: from the encoder's `instructions`, and which of them steers.
      top: candidates that are encoded again.

    Returns:
      Indices and conditioned cosines, both [1, k] with k = min(top, N). Equal cosines stand in the
      order of the images.
    """
    candidates = np.sort(nearest(query[None], static, min(top, len(pixels))).indices[0])
    rows = Rows(candidates, np.full(len(candidates), instruction))
    steered = galleries.steered(model, pixels, states, rows, images_per_step=galleries.batch_size)
    found = nearest(query[None], np.asarray(steered.embedding), len(candidates))
    return Neighbours(candidates[found.indices], found.scores)
