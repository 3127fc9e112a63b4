"""Overlays on images: heat maps, boxes and masks.

Everything is uint8 numpy in and out; nothing changes its input. Letters: H W image, h w patch grid,
C side of a square image, R regions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Real, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from perception_jax.errors import DataError
from perception_jax.viz import colormap
from perception_jax.viz.colormap import RGB
from perception_jax.viz.formatting import Number


def check_image(image: np.ndarray, where: str) -> None:
    """Raises `DataError` unless `image` is uint8[H, W, 3] with at least one pixel."""
    is_image = image.dtype == np.uint8 and image.ndim == 3 and image.shape[-1] == 3 and image.size
    if not is_image:
        raise DataError(
            f"expected a non-empty uint8[H, W, 3] image, found {image.dtype}{list(image.shape)} in "
            f"{where}; scale floats in [0, 1] by 255 and convert with `.astype(np.uint8)`"
        )


def upsample(
    values: Real[np.ndarray, "h w"], height: int, width: int
) -> Float[np.ndarray, "{height} {width}"]:
    """Bilinear resize of a patch map to pixels, with half-pixel centres and repeated edges."""
    picture = Image.fromarray(np.asarray(values, np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def heatmap(
    image: UInt8[np.ndarray, "H W 3"],
    values: Real[np.ndarray, "h w"],
    *,
    alpha: Number = 0.75,
    vmin: Number | None = None,
    vmax: Number | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Blends a coloured patch map over an image.

    Args:
      image: the picture.
      values: one number per patch, finite; any grid size.
      alpha: weight of the colours where the map is highest, in [0, 1]; half of it where the map is
        lowest, so that the image stays readable around a peak.
      vmin, vmax: the range of the colours; the map's own range where None. Give both to compare
        maps. A constant map without a range is all dark.

    Raises:
      DataError: a value is NaN or infinite, or the image is not uint8.
    """
    check_image(image, "heatmap")
    unit = colormap.normalise(values, vmin=vmin, vmax=vmax)
    height, width = image.shape[:2]
    # Normalised before resizing: the range then is that of the patches, whatever the image size.
    unit = upsample(unit, height, width)
    colours = colormap.apply(unit, vmin=0.0, vmax=1.0)
    return _blend(image, colours, (alpha * (0.5 + 0.5 * unit))[..., None])


def over_grey(
    image: UInt8[np.ndarray, "C C 3"], values: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "C C 3"]:
    """Draws a map, enlarged smoothly, over the image in grey."""
    low, high = float(values.min()), float(values.max())
    smooth = np.clip(enlarged(values, len(image)), low, high)
    return heatmap(grey(image), smooth, vmin=low, vmax=high)


def grey(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Converts an image to grey RGB."""
    return np.array(Image.fromarray(image).convert("L").convert("RGB"))


def enlarged(values: Float[np.ndarray, "h w"], side: int) -> Float[np.ndarray, "{side} {side}"]:
    """Resizes a map bicubically; bilinear interpolation of few patches has visible edges."""
    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


def blurred(values: Float[np.ndarray, "H W"], radius: Number) -> Float[np.ndarray, "H W"]:
    """Smooths a map of pixels; its range becomes [0, 255]."""
    # Pillow blurs bytes alone; 255 levels are more than the eye tells apart in a map.
    levels = Image.fromarray(np.round(255 * colormap.normalise(values)).astype(np.uint8))
    return np.asarray(levels.filter(ImageFilter.GaussianBlur(radius)), np.float32)


def _blend(below: np.ndarray, above: np.ndarray | RGB, alpha: Number | np.ndarray) -> np.ndarray:
    mixed = (1 - alpha) * np.asarray(below, np.float32) + alpha * np.asarray(above, np.float32)
    return np.round(mixed).astype(np.uint8)


def draw_boxes(
    image: UInt8[np.ndarray, "H W 3"],
    boxes: Real[np.ndarray, "R 4"],
    labels: Sequence[str] | None = None,
    colours: Sequence[RGB] | None = None,
    *,
    width: int | None = None,
    font_size: int | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Outlines boxes and writes their labels, above a box where there is room, else inside it.

    Args:
      image: the picture; enlarge tiny ones (and their boxes) first, or labels will not be legible.
      boxes: xyxy pixels; parts outside the image are cut off.
      labels: one per box; "" writes nothing.
      colours: one per box; the categorical palette where None.
      width: line width in pixels, by default a 150th of the longer side.
      font_size: in pixels, by default an 18th of the longer side, at least 10.

    Raises:
      DataError: lengths differ, or a box is not finite or has x2 < x1 or y2 < y1.
    """
    check_image(image, "draw_boxes")
    count = len(boxes)
    labels = [""] * count if labels is None else list(labels)
    colours = [colormap.categorical(k) for k in range(count)] if colours is None else list(colours)
    if not len(labels) == len(colours) == count:
        raise DataError(
            f"expected one label and one colour per box, found {count} boxes, {len(labels)} labels "
            f"and {len(colours)} colours in draw_boxes"
        )
    for index, (x1, y1, x2, y2) in enumerate(np.asarray(boxes, np.float64)):
        if not (np.isfinite([x1, y1, x2, y2]).all() and x1 <= x2 and y1 <= y2):
            raise DataError(
                "expected finite xyxy pixels with x1 <= x2 and y1 <= y2, found "
                f"{[float(x1), float(y1), float(x2), float(y2)]} at box {index} in draw_boxes; "
                "convert cxcywh or xywh boxes first"
            )
    longer = max(image.shape[:2])
    width = max(1, round(longer / 150)) if width is None else width
    font = ImageFont.load_default(max(10, round(longer / 18)) if font_size is None else font_size)
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    # Two passes, so that no outline crosses another box's label.
    for box, colour in zip(boxes, colours, strict=True):
        _outline(draw, box, colour, width, canvas.size)
    for box, label, colour in zip(boxes, labels, colours, strict=True):
        if label:
            _label(draw, box, label, colour, font, canvas.size)
    return np.array(canvas)


def _outline(
    draw: ImageDraw.ImageDraw, box: np.ndarray, colour: RGB, width: int, size: tuple[int, int]
) -> None:
    """Draws the box's edge; pixel k covers [k, k + 1), so the last pixel is ceil(x2) - 1."""
    x1, y1 = (int(np.floor(v)) for v in box[:2])
    x2, y2 = (int(np.ceil(v)) - 1 for v in box[2:])
    # A far-away corner would overflow Pillow's integers; the outline just leaves the image.
    limits = (size[0] + width, size[1] + width)
    x1, x2 = (int(np.clip(v, -width - 1, limits[0])) for v in (x1, max(x1, x2)))
    y1, y2 = (int(np.clip(v, -width - 1, limits[1])) for v in (y1, max(y1, y2)))
    draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)


def _label(
    draw: ImageDraw.ImageDraw,
    box: np.ndarray,
    label: str,
    colour: RGB,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    pad = max(1, round(font.size / 6))
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    tag_width, tag_height = int(right - left) + 2 * pad, int(bottom - top) + 2 * pad
    x = int(np.clip(np.floor(box[0]), 0, max(0, size[0] - tag_width)))
    y = int(np.floor(box[1])) - tag_height
    if y < 0:
        y = int(np.clip(np.floor(box[1]), 0, max(0, size[1] - tag_height)))
    draw.rectangle((x, y, x + tag_width - 1, y + tag_height - 1), fill=colour)
    ink = colormap.text_colour(colour)
    draw.text((x + pad - left, y + pad - top), label, fill=ink, font=font)


def draw_masks(
    image: UInt8[np.ndarray, "H W 3"],
    masks: Bool[np.ndarray, "R H W"],
    colours: Sequence[RGB] | None = None,
    *,
    alpha: Number = 0.45,
) -> UInt8[np.ndarray, "H W 3"]:
    """Tints each mask and draws its inner edge solid; later masks are drawn over earlier ones.

    Raises:
      DataError: masks and image differ in size, or masks and colours in number.
    """
    check_image(image, "draw_masks")
    colours = [colormap.categorical(k) for k in range(len(masks))] if colours is None else colours
    if masks.shape[1:] != image.shape[:2] or len(colours) != len(masks):
        raise DataError(
            f"expected masks of the image's size {image.shape[:2]} and one colour each, found "
            f"masks {masks.shape} and {len(colours)} colours in draw_masks"
        )
    result = image.copy()
    for mask, colour in zip(masks, colours, strict=True):
        result[mask] = _blend(result[mask], colour, alpha)
        result[_edge(mask)] = colour
    return result


def _edge(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a 4-neighbour outside it; the image border does not count."""
    padded = np.pad(mask, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside
