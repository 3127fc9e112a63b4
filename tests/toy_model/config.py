"""Configuration of the toy, and its settings in the layout of Hugging Face."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Attributes:
    size: side of the images, pixels.
    width: of the embedding.
    """

    size: int
    width: int

    @classmethod
    def from_hf(cls, settings: Mapping[str, Any]) -> ToyConfig:
        return cls(size=settings["image_size"], width=settings["hidden_size"])

    def to_hf(self) -> dict[str, Any]:
        return {"model_type": "toy", "image_size": self.size, "hidden_size": self.width}
