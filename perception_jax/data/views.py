"""Views of an image: the processor at another size, and the part covered by patches.

Letters: H W image, C side of the shown picture.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import UInt8

from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """An image as the model's input and as pixels for display.

    Attributes:
      pixels: what the model gets.
      picture: the part that its patches cover, scaled from the original.
      region: the same part in the original, xyxy pixels; reaches beyond the image where it was
        padded.
      original_size: width and height, pixels.
    """

    pixels: UInt8[np.ndarray, "S S 3"]
    picture: UInt8[np.ndarray, "C C 3"]
    region: tuple[float, float, float, float]
    original_size: tuple[int, int]


def view(
    processor: ImageProcessor, original: UInt8[np.ndarray, "H W 3"], *, patch: int, side: int
) -> View:
    """Processes an image for a model with patches of this size.

    Args:
      patch: side of a patch; what whole ones leave over at the right and at the bottom is not
        covered.
      side: of `picture`.

    Raises:
      ConfigError: a processor that does not make squares.
    """
    require_square(processor)
    processed = processor(original)
    covered = processor.size // patch * patch
    corners = np.array([[0.0, 0.0, covered, covered]])
    shown = at_size(processor, round(side * processor.size / covered))
    return View(
        pixels=processed.pixels,
        picture=shown(original).pixels[:side, :side],
        region=tuple(processed.geometry.inverse_boxes(corners)[0].tolist()),
        original_size=(original.shape[1], original.shape[0]),
    )


def require_square(processor: ImageProcessor) -> None:
    """Raises an error for a processor that yields images of several sizes.

    Raises:
      ConfigError: it keeps proportions.
    """
    if not processor.is_square:
        raise ConfigError(
            f'mode "{processor.mode}" gives images of many sizes; here all must have one: take '
            'another mode, such as "squash" or "hf_crop".'
        )


def scaled(processor: ImageProcessor, scale: float, patch: int) -> ImageProcessor:
    """Returns the processor for a multiple of its size, in whole patches unless the factor is 1.

    Raises:
      ConfigError: a scale that is not a positive number.
    """
    if not 0 < scale < float("inf"):
        raise ConfigError(f"scale: expected a number above 0, found {scale}.")
    if scale == 1:
        return processor
    return at_size(processor, max(1, round(processor.size * scale / patch)) * patch)


def at_size(processor: ImageProcessor, size: int) -> ImageProcessor:
    """Returns the processor for another size in pixels, keeping the same part of every image."""
    resize = processor.resize and max(size, round(processor.resize * size / processor.size))
    return dataclasses.replace(processor, size=size, resize=resize)
