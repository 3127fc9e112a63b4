"""What GiVE saw in an image, as data: for the picture and for JSON.

Letters: C side of the shown picture.
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
    """A caption and its cosine with the steered image."""

    caption: str
    cosine: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of many objects that an image was asked about.

    Attributes:
      name: as given.
      instruction: that named it.
      presence_logit: above 0 it is there; candidates are ranked by it.
      calibrated_cosine: of the steered image and the name's prototype, less the same of an image
        without content (which is what steering copies into any image).
    """

    name: str
    instruction: str
    presence_logit: float
    calibrated_cosine: float

    @property
    def presence(self) -> float:
        """The probability that it is there."""
        return _sigmoid(self.presence_logit)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What was seen under one instruction.

    Attributes:
      instruction: as the model got it.
      presence_logit: above 0 the object is there; None if the head was never trained.
      cosine: of the steered image and the instruction; high for absent objects too, since steering
        copies the instruction into the image.
      cosine_blank: the same of an image without content: how much is copied.
      cosine_static: the same of the image without an instruction.
      captions: nearest to the steered image, best first.
      attention: to each patch under the instruction, mean over heads.
      relevance: which patches speak for the object's presence; for the cosine if the head was never
        trained.
      places: share of the object, if it is there, that each patch shows; their sum is 1. None
        without a trained head for it.
      words: share of each patch's attention in the adapters that goes to the instruction's words
        and not to its start and end; None if adapters add nothing. It tells how adapters read, not
        where the object is.
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
        """The probability that the object is there."""
        return None if self.presence_logit is None else _sigmoid(self.presence_logit)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What GiVE sees in one image.

    Attributes:
      picture: the part of the image that the patches cover, scaled from the original.
      image_size: width and height of the original, pixels.
      input_size: width and height of what the model got, pixels.
      region: xyxy in original pixels, what the patches cover; reaches beyond the image where it was
        padded.
      alpha: strength of the steering.
      attention_of: whose attention is shown, in words.
      attention: to each patch without an instruction, mean over heads.
      told: under each instruction, then under those of the best candidates.
      candidates: all of them, the most likely first.
    """

    picture: UInt8[np.ndarray, "C C 3"]
    image_size: tuple[int, int]
    input_size: tuple[int, int]
    region: tuple[float, float, float, float]
    alpha: float
    attention_of: str
    attention: Float[np.ndarray, "rows columns"]
    told: tuple[Told, ...]
    candidates: tuple[Candidate, ...]

    def presences(self) -> list[tuple[str, float]]:
        """Names or else instructions, with the probability that they are there."""
        if self.candidates:
            return [(one.name, one.presence) for one in self.candidates]
        return [(one.instruction, one.presence) for one in self.told if one.presence is not None]

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
            "instructions": [_told_json(one) for one in self.told],
            "candidates": [
                dataclasses.asdict(one) | {"presence": one.presence} for one in self.candidates
            ],
        }


def _sigmoid(logit: float) -> float:
    return 0.5 * (1 + math.tanh(logit / 2))  # no overflow, however large the logit


_MAPS = ("attention", "relevance", "places", "words")


def _told_json(told: Told) -> dict[str, Any]:
    found = {field.name: getattr(told, field.name) for field in dataclasses.fields(told)}
    maps = {name: found[name] for name in _MAPS}
    return found | {
        "presence": told.presence,
        "captions": [dataclasses.asdict(one) for one in told.captions],
        **{name: None if values is None else listed(values) for name, values in maps.items()},
    }
