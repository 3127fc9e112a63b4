"""What every tokenizer returns. Letters: B texts, T tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Int32


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """Encoded texts.

    Attributes:
      ids: start, tokens, end, padding.
      mask: True up to and including the first end token.
    """

    ids: Int32[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
