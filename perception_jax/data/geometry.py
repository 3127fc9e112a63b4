"""The map between the original image's pixels and the model's pixels.

Both are measured from the image's top left corner in continuous coordinates: a pixel (x, y) covers
[x, x+1) × [y, y+1). Every geometric transform returns such a map, post-processing inverts it.
Letters: N boxes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """`model = original · scale + offset` per axis; a negative scale mirrors.

    Attributes:
      source: width and height of the original image, pixels.
      target: width and height of the model's image, pixels.
      scale: x and y, model pixels per original pixel, not 0.
      offset: x and y, model pixels.
      window: xyxy model pixels, the part of the model's image that shows the original: not the
        bars of a letterbox. None for all of the original that is inside `target`.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    window: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        if self.window is None:
            whole = np.array([0.0, 0.0, *self.source])
            shown = clip_boxes(self.boxes(whole), *self.target)
            object.__setattr__(self, "window", tuple(shown.tolist()))

    @classmethod
    def identity(cls, width: int, height: int) -> Geometry:
        """Returns the identity map."""
        return cls((width, height), (width, height))

    @classmethod
    def resized(cls, source: tuple[int, int], target: tuple[int, int]) -> Geometry:
        """Returns the map of resizing a `source`-sized image to `target` (widths and heights)."""
        return cls(source, target, (target[0] / source[0], target[1] / source[1]))

    def cropped(self, left: int, top: int, width: int, height: int) -> Geometry:
        """Appends a crop; negative `left`, `top` pad."""
        return self.then(Geometry(self.target, (width, height), offset=(-left * 1.0, -top * 1.0)))

    def flipped(self) -> Geometry:
        """Appends a horizontal flip."""
        width = self.target[0]
        return self.then(Geometry(self.target, self.target, (-1.0, 1.0), (width * 1.0, 0.0)))

    def then(self, following: Geometry) -> Geometry:
        """This map, then `following`, whose source is this one's target."""
        (sx, sy), (fx, fy) = self.scale, following.scale
        (ox, oy), (gx, gy) = self.offset, following.offset
        window = following.clip(following.boxes(np.array(self.window)))
        return Geometry(
            self.source,
            following.target,
            (sx * fx, sy * fy),
            (ox * fx + gx, oy * fy + gy),
            tuple(window.tolist()),
        )

    def boxes(self, boxes: Float[np.ndarray, "*N 4"]) -> Float[np.ndarray, "*N 4"]:
        """Maps boxes of the original image to model pixels without clipping; xyxy, float64."""
        scale, offset = self._tiled()
        return _ordered(boxes * scale + offset)

    def inverse_boxes(self, boxes: Float[np.ndarray, "*N 4"]) -> Float[np.ndarray, "*N 4"]:
        """Maps boxes in model pixels to original pixels without clipping; xyxy, float64."""
        scale, offset = self._tiled()
        return _ordered((boxes - offset) / scale)

    def clip(self, boxes: Float[np.ndarray, "*N 4"]) -> Float[np.ndarray, "*N 4"]:
        """Clips boxes in model pixels to the part of the model's image that shows the original."""
        low, high = np.array(self.window[:2] * 2), np.array(self.window[2:] * 2)
        return np.clip(boxes, low, high)

    def clip_source(self, boxes: Float[np.ndarray, "*N 4"]) -> Float[np.ndarray, "*N 4"]:
        """Clips boxes in original pixels to the original image."""
        return clip_boxes(boxes, *self.source)

    def kept_share(self, boxes: Float[np.ndarray, "*N 4"]) -> Float[np.ndarray, "*N"]:
        """Computes the share of each original box's area that remains in the model's image.

        Args:
          boxes: xyxy, original pixels.

        Returns:
          The share of the box's area, in [0, 1]; 0 for a box without area.
        """
        mapped = self.boxes(boxes)
        area, kept = _area(mapped), _area(self.clip(mapped))
        return np.where(area > 0, kept / np.where(area > 0, area, 1.0), 0.0)

    def keeps(
        self, boxes: Float[np.ndarray, "*N 4"], *, min_share: float = 0.5
    ) -> Bool[np.ndarray, "*N"]:
        """Returns which boxes of the original (xyxy) keep at least `min_share` of their area."""
        return self.kept_share(boxes) >= min_share

    def _tiled(self) -> tuple[np.ndarray, np.ndarray]:
        return np.array(self.scale * 2, np.float64), np.array(self.offset * 2, np.float64)


def clip_boxes(
    boxes: Float[np.ndarray, "*N 4"], width: int, height: int
) -> Float[np.ndarray, "*N 4"]:
    """Clips boxes (xyxy, pixels) to a `width` × `height` image."""
    return np.clip(boxes, 0.0, np.array([width, height, width, height], np.float64))


def rotate_boxes(
    boxes: Float[np.ndarray, "*N 4"], orientation: int, stored: tuple[int, int]
) -> Float[np.ndarray, "*N 4"]:
    """Transforms boxes (xyxy) from a file's stored pixels to the picture with EXIF's orientation.

    Args:
      orientation: EXIF's, in [1, 8].
      stored: width and height of the stored pixels.
    """
    mirrored_x = orientation in (2, 3, 7, 8)
    mirrored_y = orientation in (3, 4, 6, 7)
    turned = np.array(boxes, np.float64)
    if mirrored_x:
        turned[..., 0::2] = stored[0] - turned[..., 0::2]
    if mirrored_y:
        turned[..., 1::2] = stored[1] - turned[..., 1::2]
    if orientation >= 5:
        turned = turned[..., [1, 0, 3, 2]]
    return _ordered(turned)


def _ordered(boxes: np.ndarray) -> np.ndarray:
    """Restores x1 ≤ x2, y1 ≤ y2 after a mirrored axis."""
    first, second = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=-1)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
