"""From a scene's spec to pixels, exact boxes and exact masks.

Shape letters: H W canvas, N placements.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from perception_jax.data.scenes.backgrounds import draw_background
from perception_jax.data.scenes.palette import COLOURS
from perception_jax.data.scenes.spec import DrawnText, RenderedObject, SceneSpec
from perception_jax.data.scenes.sprites import placed
from perception_jax.errors import DataError

_TEXT = -2
_NOTHING = -1


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

    A pixel belongs to the last placement that covers it by more than one half.

    Args:
      canvas: (height, width) in pixels, or the side of a square.

    Raises:
      DataError: unknown concept, style, colour or background, or a canvas without pixels.
    """
    height, width = (canvas, canvas) if isinstance(canvas, int) else canvas
    if min(height, width) < 1:
        raise DataError(f"expected a canvas of at least 1 × 1 pixels, found {height} × {width}.")
    image = Image.fromarray(draw_background(spec.background, (height, width)))
    owner = np.full((height, width), _NOTHING, np.int8)
    totals = []
    for index, placement in enumerate(spec.placements):
        patch, corner = placed(placement, (height, width))
        alpha = patch.getchannel("A")
        if placement.opacity < 1.0:
            alpha = alpha.point([round(value * placement.opacity) for value in range(256)])
        image.paste(patch.convert("RGB"), corner, alpha)
        totals.append(_claim(owner, alpha, corner, index))
    if spec.text is not None:
        _draw_text(image, owner, spec.text)
    masks = owner == np.arange(len(spec.placements), dtype=np.int8)[:, None, None]
    objects = tuple(
        RenderedObject(
            placement=placement,
            box=_tight_box(mask, (placement.x * width, placement.y * height)),
            visible=float(mask.sum()) / total if total else 0.0,
        )
        for placement, mask, total in zip(spec.placements, masks, totals, strict=True)
    )
    return Rendered(image=np.asarray(image), objects=objects, masks=masks)


def visible_shares(spec: SceneSpec, canvas: tuple[int, int]) -> list[float]:
    """Each placement's visible share, as `render` finds it, without drawing colours."""
    owner = np.full(canvas, _NOTHING, np.int8)
    totals = []
    for index, placement in enumerate(spec.placements):
        patch, corner = placed(placement, canvas)
        alpha = patch.getchannel("A").point(lambda a, o=placement.opacity: round(a * o))
        totals.append(_claim(owner, alpha, corner, index))
    counts = np.bincount(owner[owner >= 0], minlength=len(totals))
    return [float(c) / t if t else 0.0 for c, t in zip(counts, totals, strict=True)]


def _claim(owner: np.ndarray, alpha: Image.Image, corner: tuple[int, int], index: int) -> int:
    """Marks the pixels that `alpha` covers as `index`'s; returns how many it covers anywhere."""
    covered = np.asarray(alpha) > 127
    height, width = owner.shape
    left, top = corner
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + alpha.width, width), min(top + alpha.height, height)
    if x0 < x1 and y0 < y1:
        inside = covered[y0 - top : y1 - top, x0 - left : x1 - left]
        owner[y0:y1, x0:x1][inside] = index
    return int(covered.sum())


def _tight_box(
    mask: Bool[np.ndarray, "H W"], centre: tuple[float, float]
) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (*centre, *centre)
    return (
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] + 1),
        float(rows[-1] + 1),
    )


@functools.lru_cache(maxsize=64)
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(pixels)


def _draw_text(image: Image.Image, owner: np.ndarray, text: DrawnText) -> None:
    """Draws the word with an outline that stands out from its colour."""
    height, width = owner.shape
    pixels = max(1, round(text.size * min(height, width)))
    outline = max(1, pixels // 9)
    colour = COLOURS[text.colour]
    dark = sum(colour) < 384
    alpha = Image.new("L", image.size)
    at = (text.x * width, text.y * height)
    ImageDraw.Draw(alpha).text(
        at, text.text, 255, _font(pixels), anchor="mm", stroke_width=outline
    )
    ImageDraw.Draw(image).text(
        at,
        text.text,
        colour,
        _font(pixels),
        anchor="mm",
        stroke_width=outline,
        stroke_fill=COLOURS["white" if dark else "black"],
    )
    _claim(owner, alpha, (0, 0), _TEXT)
