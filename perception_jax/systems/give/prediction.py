"""The prediction of GiVE for an image, for its picture and for JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from perception_jax.inference.single_image import ImagePrediction, as_json


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaptionScore:
    """A caption and its cosine with the conditioned image embedding."""

    caption: str
    cosine: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A candidate object with its scores.

    Attributes:
      name: as given.
      instruction: the instruction made of the name.
      presence_logit: positive if the object is present; candidates are ranked by it.
      calibrated_cosine: cosine of the conditioned image and the name's prototype, minus the same
        for an image without content (the part that is copied from the instruction).
    """

    name: str
    instruction: str
    presence_logit: float
    calibrated_cosine: float

    @property
    def presence(self) -> float:
        """Probability that the object is present."""
        return _sigmoid(self.presence_logit)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InstructionPrediction:
    """Scores and maps of an image under one instruction.

    Attributes:
      instruction: the text.
      presence_logit: positive if the object is present; None if the head was never trained.
      cosine: of the conditioned image and the instruction; high for absent objects too, since
        adapters copy the instruction into the embedding.
      cosine_blank: the same for an image without content: the part that is copied.
      cosine_static: the same for the unconditioned image.
      captions: nearest to the conditioned image, best first.
      attention: to each patch, conditioned, mean over heads.
      relevance: of each patch for the presence logit; for the cosine if the head was never trained.
      places: share of the object, if it is there, that each patch shows; they sum to 1. None
        without a trained dense head.
      words: share of each patch's attention in the adapters that goes to the instruction's words
        and not to its start and end tokens; None if adapters add nothing. It does not locate the
        object.
    """

    instruction: str
    presence_logit: float | None
    cosine: float
    cosine_blank: float
    cosine_static: float
    captions: tuple[CaptionScore, ...]
    attention: Float[np.ndarray, "rows columns"]
    relevance: Float[np.ndarray, "rows columns"]
    places: Float[np.ndarray, "rows columns"] | None
    words: Float[np.ndarray, "rows columns"] | None

    @property
    def presence(self) -> float | None:
        """Probability that the object is present."""
        return None if self.presence_logit is None else _sigmoid(self.presence_logit)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GivePrediction(ImagePrediction):
    """The prediction for one image; `attention` is that without an instruction.

    Attributes:
      alpha: strength of the conditioning.
      instructions: for each instruction, then for those of the best candidates.
      candidates: all candidates, the most likely first.
    """

    alpha: float
    instructions: tuple[InstructionPrediction, ...]
    candidates: tuple[Candidate, ...]

    def presences(self) -> list[tuple[str, float]]:
        """Names of candidates, or else instructions, with the probability that they are present."""
        if self.candidates:
            return [(one.name, one.presence) for one in self.candidates]
        return [
            (one.instruction, one.presence) for one in self.instructions if one.presence is not None
        ]

    def to_json(self) -> dict[str, Any]:
        """As of `ImagePrediction`, with scores and maps under each instruction."""
        # Not super(): a dataclass with slots is a new class.
        return ImagePrediction.to_json(self) | {
            "alpha": self.alpha,
            "instructions": as_json(self.instructions),
            "candidates": as_json(self.candidates),
        }


def _sigmoid(logit: float) -> float:
    return 0.5 * (1 + math.tanh(logit / 2))  # no overflow, however large the logit
