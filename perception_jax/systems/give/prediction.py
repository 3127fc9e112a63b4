"""The prediction of GiVE for an image, for its picture and for JSON.

Letters: C side of the picture.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from perception_jax.viz.patch_maps import listed


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
class GivePrediction:
    """The prediction for one image.

    Attributes:
      picture: the part of the image that the patches cover, scaled from the original.
      image_size: width and height of the original, pixels.
      input_size: width and height of the model's input, pixels.
      region: the part that the patches cover, xyxy in original pixels; extends beyond the image
        where it was padded.
      alpha: strength of the conditioning.
      attention_of: the token or head whose attention is shown, in words.
      attention: to each patch without an instruction, mean over heads.
      instructions: for each instruction, then for those of the best candidates.
      candidates: all candidates, the most likely first.
    """

    picture: UInt8[np.ndarray, "C C 3"]
    image_size: tuple[int, int]
    input_size: tuple[int, int]
    region: tuple[float, float, float, float]
    alpha: float
    attention_of: str
    attention: Float[np.ndarray, "rows columns"]
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
        """Sizes, scores, and the maps on the patch grid, rows from the top."""
        return {
            "image_size": list(self.image_size),
            "input_size": list(self.input_size),
            "region": list(self.region),
            "grid": list(self.attention.shape),
            "alpha": self.alpha,
            "attention_of": self.attention_of,
            "attention": listed(self.attention),
            "instructions": [_instruction_json(one) for one in self.instructions],
            "candidates": [
                dataclasses.asdict(one) | {"presence": one.presence} for one in self.candidates
            ],
        }


def _sigmoid(logit: float) -> float:
    return 0.5 * (1 + math.tanh(logit / 2))  # no overflow, however large the logit


_MAPS = ("attention", "relevance", "places", "words")


def _instruction_json(prediction: InstructionPrediction) -> dict[str, Any]:
    found = {
        field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)
    }
    maps = {name: found[name] for name in _MAPS}
    return found | {
        "presence": prediction.presence,
        "captions": [dataclasses.asdict(one) for one in prediction.captions],
        **{name: None if values is None else listed(values) for name, values in maps.items()},
    }
