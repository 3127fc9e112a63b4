"""Text prototypes of classes.

Letters: c classes, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from perception_jax.data.moinst.names import clean_name
from perception_jax.evals.zero_shot import EncodeTexts, class_embeddings

TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "there is a {} in the scene.")
"""Prompts of a class; its prototype is the mean of their embeddings, scaled to length 1."""


def prototypes(encode_texts: EncodeTexts, names: Sequence[str]) -> Float[np.ndarray, "c d"]:
    """Unit text prototype of each class; names that clean to the same word share theirs.

    Raises:
      DataError: an embedding is zero or not finite.
    """
    cleaned = [clean_name(name) for name in names]
    distinct = sorted(set(cleaned))
    rows = class_embeddings(encode_texts, distinct, TEMPLATES)
    place = {name: row for row, name in enumerate(distinct)}
    return rows[[place[name] for name in cleaned]]
