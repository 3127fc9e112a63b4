"""Colours: matplotlib's `inferno` for values and a palette for categories.

The palette's colours have a contrast of at least 3:1 (WCAG 2.2, 1.4.11) on white and on
near-black, so one chart serves both themes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Real, UInt8
from PIL import ImageColor

from perception_jax.errors import DataError
from perception_jax.viz.formatting import Number

RGB = tuple[int, int, int]
"""A colour as red, green and blue, 0 to 255."""

SEQUENTIAL = "inferno"
"""Perceptually uniform colormap: black over violet, red and orange to pale yellow."""

CATEGORICAL = (
    "#296cd8",
    "#df7421",
    "#0a8681",
    "#da5ab6",
    "#766f08",
    "#957ee5",
    "#c52a38",
    "#41a149",
)
"""Hex colours of categories; `categorical(i)` cycles through them."""


def normalise(
    values: Real[np.ndarray, "*shape"],
    *,
    vmin: Number | None = None,
    vmax: Number | None = None,
) -> Float[np.ndarray, "*shape"]:
    """Maps `[vmin, vmax]` to [0, 1] and clips; a constant array becomes zeros.

    Args:
      values: any shape, finite.
      vmin, vmax: the range; the smallest and largest value where None.

    Raises:
      DataError: a value is NaN or infinite.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise DataError(
            f"expected finite values to colour, found {values[index]} at index {index} of shape "
            f"{values.shape}; check the map for NaN before drawing it"
        )
    low = (values.min() if values.size else 0.0) if vmin is None else float(vmin)
    high = (values.max() if values.size else 0.0) if vmax is None else float(vmax)
    if high <= low:
        return np.zeros(values.shape)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


def apply(
    values: Real[np.ndarray, "*shape"],
    *,
    vmin: Number | None = None,
    vmax: Number | None = None,
) -> UInt8[np.ndarray, "*shape 3"]:
    """Colours values by `SEQUENTIAL` over `[vmin, vmax]`, by default their own range."""
    import matplotlib

    unit = normalise(values, vmin=vmin, vmax=vmax)
    return matplotlib.colormaps[SEQUENTIAL](unit, bytes=True)[..., :3]


def categorical(index: int) -> RGB:
    """The palette's colour number `index`, cycling."""
    return ImageColor.getrgb(CATEGORICAL[index % len(CATEGORICAL)])


def luminance(colour: RGB) -> float:
    """Relative luminance in [0, 1] (WCAG 2.2)."""
    channels = np.array(colour) / 255.0
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def text_colour(background: RGB) -> RGB:
    """Black or white, whichever reads better on `background`."""
    # Where both have the same contrast, (L + 0.05) / 0.05 = 1.05 / (L + 0.05).
    return (0, 0, 0) if luminance(background) > 0.179 else (255, 255, 255)
