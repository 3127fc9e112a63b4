"""Renders a scene's spec to pixels, exact boxes and exact masks.

Shape letters: H W canvas, N placements.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw

from perception_jax.data.scenes.backgrounds import draw_background
from perception_jax.data.scenes.palette import COLOURS
from perception_jax.data.scenes.spec import RenderedObject, SceneSpec
from perception_jax.data.scenes.sprites import corner, drawing
from perception_jax.data.scenes.visibility import VisibilityMap, shape_of, text_shape, write
from perception_jax.errors import DataError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A drawn scene; `objects[k]` and `masks[k]` belong to `spec.placements[k]`.

    Attributes:
      image: the pixels.
      objects: box and visible share of each placement.
      masks: visible pixels of each placement; no two overlap.
    """

    image: UInt8[np.ndarray, "H W 3"]
    objects: tuple[RenderedObject, ...]
    masks: Bool[np.ndarray, "N H W"]


def render(spec: SceneSpec, canvas: int | tuple[int, int]) -> Rendered:
    """Draws a scene: background, placements in order, text on top.

    A pixel belongs to the last placement (or the text) that covers it by more than one half.

    Args:
      canvas: (height, width) in pixels, or the side of a square.

    Raises:
      DataError: unknown concept, style, colour or background, or a canvas without pixels.
    """
    shape = (canvas, canvas) if isinstance(canvas, int) else canvas
    if min(shape) < 1:
        raise DataError(f"expected a canvas of at least 1 × 1 pixels, found {shape}.")
    image = Image.fromarray(draw_background(spec.background, shape))
    visibility = VisibilityMap(shape)
    for placement in spec.placements:
        sprite = drawing(placement, shape)
        at = corner(placement.x, placement.y, sprite.size, shape)
        alpha = sprite.getchannel("A")
        visibility.cover(shape_of(alpha, placement.opacity), at)
        if placement.opacity < 1.0:
            alpha = alpha.point([round(value * placement.opacity) for value in range(256)])
        image.paste(sprite.convert("RGB"), at, alpha)
    if (text := spec.text) is not None:
        colour = COLOURS[text.colour]
        outline = COLOURS["white" if sum(colour) < 384 else "black"]
        write(ImageDraw.Draw(image), text, shape, colour, outline)
        visibility.cover_text(text_shape(text, shape), (0, 0))
    masks = visibility.masks()
    objects = tuple(
        RenderedObject(
            placement=placement,
            box=_tight_box(mask, (placement.x * shape[1], placement.y * shape[0])),
            visible=share,
        )
        for placement, mask, share in zip(spec.placements, masks, visibility.shares(), strict=True)
    )
    return Rendered(image=np.asarray(image), objects=objects, masks=masks)


def _tight_box(
    mask: Bool[np.ndarray, "H W"], centre: tuple[float, float]
) -> tuple[float, float, float, float]:
    """xyxy around the mask's pixels; the centre twice if there are none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (*centre, *centre)
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
