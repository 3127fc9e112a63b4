"""Annotated sizes compared with the image files: boxes are those of the picture as shown.

Annotations may speak of a file's stored pixels where its EXIF orientation turns the picture, or of
an image that was resized since. The first is undone, the second is an error.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from perception_jax.data import geometry, images, records
from perception_jax.errors import DataError, ImageError

_LOGGER = logging.getLogger(__name__)
_warned: set[str] = set()


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """The frame of reference of annotated boxes.

    Attributes:
      size: width and height of the picture as shown.
      header: of the image file, if the boxes are those of its stored pixels; None if they are
        those of the picture.
    """

    size: tuple[int, int]
    header: images.Header | None = None

    def box(self, box: records.Box) -> records.Box:
        """A box of the annotations as one of the picture."""
        if self.header is None:
            return box
        corners = np.array(box, np.float64)
        turned = geometry.rotate_boxes(corners, self.header.orientation, self.header.stored)
        return tuple(turned.tolist())


def compare(image: records.Image, annotated: tuple[int, int], where: str, source: str) -> Frame:
    """Finds out which pixels boxes of an image of this annotated size are relative to.

    An image that cannot be read is left to whoever decodes it.

    Args:
      where: the record in its file, for the message.
      source: the file; of an image whose orientation its size cannot confirm, it is warned once.

    Raises:
      DataError: the image has neither this size as shown nor as stored.
    """
    try:
        header = images.read_header(image)
    except ImageError:
        return Frame(annotated)
    if annotated == header.shown:
        if header.orientation > 1 and annotated == header.stored and source not in _warned:
            _warned.add(source)
            _LOGGER.warning(
                "%s: the image has EXIF orientation %d, which leaves its size as it is; boxes are "
                "taken as those of the picture as shown, here and for other such images.",
                where,
                header.orientation,
            )
        return Frame(annotated)
    if annotated == header.stored:
        return Frame(header.shown, header)
    shown = "×".join(map(str, header.shown))
    raise DataError(
        f"{where}: expected the size of its image, {shown} pixels, found "
        f"{annotated[0]}×{annotated[1]}. The boxes belong to another version of {image}: fetch "
        "that, or scale the annotations."
    )
