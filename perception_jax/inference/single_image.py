"""Predictions for single images: the views of an image, and what every prediction says of it.

Letters: H W image, C side of the shown picture.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from perception_jax.data import images, views
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import Image
from perception_jax.inference.images import ImageResult


class Viewer:
    """Reads images as the model's input and as the part that its patches cover.

    Attributes:
      processor: of images at the chosen scale.
    """

    def __init__(
        self, processor: ImageProcessor, *, patch: int, side: int, scale: float = 1.0
    ) -> None:
        """Args: patch, side: see `data.views.view`. scale: see `data.views.scaled`.

        Raises:
          ConfigError: a scale that is not a positive number.
        """
        self.processor = views.scaled(processor, scale, patch)
        self._patch, self._side = patch, side

    def __call__(self, image: Image, *, name: str = "") -> views.View:
        """Reads one image.

        Args:
          image: uint8[height, width, 3], an encoded file's bytes, or a path.
          name: of the image in an error; a path names itself.

        Raises:
          ImageError: the image cannot be decoded.
        """
        original = images.decode(image, name=name)
        return views.view(self.processor, original, patch=self._patch, side=self._side)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImagePrediction:
    """What predictions of all models with an image tower say of an image.

    Attributes:
      view: the model's input, and the part of the image that its patches cover.
      attention_of: the token or head whose attention is shown, in words.
      attention: to each patch, mean over heads.
    """

    view: views.View
    attention_of: str
    attention: Float[np.ndarray, "rows columns"]

    @property
    def picture(self) -> UInt8[np.ndarray, "C C 3"]:
        """The part of the image that the patches cover, scaled from the original."""
        return self.view.picture

    @property
    def image_size(self) -> tuple[int, int]:
        """Width and height of the original, pixels."""
        return self.view.original_size

    @property
    def input_size(self) -> tuple[int, int]:
        """Width and height of the model's input, pixels."""
        height, width = self.view.pixels.shape[:2]
        return width, height

    @property
    def region(self) -> tuple[float, float, float, float]:
        """The part that the patches cover, xyxy in original pixels; reaches beyond the image where
        it was padded."""
        return self.view.region

    def sizes(self) -> tuple[str, str]:
        """Sizes of the original and of the model's input, "width x height"."""
        # The font of pictures has no multiplication sign.
        return tuple(f"{w} x {h}" for w, h in (self.image_size, self.input_size))

    def to_json(self) -> dict[str, Any]:
        """Sizes, `region` and attention, rows from the top."""
        return {
            "image_size": list(self.image_size),
            "input_size": list(self.input_size),
            "region": list(self.region),
            "grid": list(self.attention.shape),
            "attention_of": self.attention_of,
            "attention": listed(self.attention),
        }


def as_json(value: Any) -> Any:
    """Converts dataclasses to JSON values by their fields and properties, maps by `listed`."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        names += [name for name, own in vars(type(value)).items() if isinstance(own, property)]
        return {name: as_json(getattr(value, name)) for name in names}
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    return listed(value) if isinstance(value, np.ndarray) else value


def listed(values: Float[np.ndarray, "h w"]) -> list[list[float]]:
    """Converts a map to nested lists for JSON, rows from the top, numbers of five digits."""
    return [[float(f"{value:.5g}") for value in row] for row in values]


def results_of(
    predict: Callable[[pathlib.Path], ImagePrediction],
    draw: Callable[[Any, str], UInt8[np.ndarray, "_ _ 3"]],
    summary: Callable[[Any], Iterable[str]],
    facts: Mapping[str, Any],
) -> Callable[[pathlib.Path], ImageResult]:
    """Makes the function of an image file that a program's `predictor` returns.

    Args:
      predict: gives the prediction of an image file.
      draw: draws a prediction and the name of its image.
      summary: short texts for the terminal.
      facts: JSON values that are the same for all images.
    """

    def result(image: pathlib.Path) -> ImageResult:
        found = predict(image)
        return ImageResult(
            picture=draw(found, image.name),
            facts={**facts, "image": str(image), **found.to_json()},
            line="".join(f"  {text}" for text in summary(found)),
        )

    return result
