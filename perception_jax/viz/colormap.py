"""Colours: a perceptually uniform map for values and a palette for categories.

The map is a curve in OKLab (Ottosson, "A perceptual color space for image processing", 2020),
resampled so that neighbouring entries are equally far apart there: equal steps of the value look
like equal steps of colour, and lightness only rises. The palette's colours have a contrast of at
least 3:1 (WCAG 2.2, 1.4.11) on white and on near-black, so one chart serves both themes.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float, Real, UInt8

from perception_jax.errors import DataError
from perception_jax.viz.axes import Number

RGB = tuple[int, int, int]

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
"""Hex colours; neighbours differ in hue and lightness. Use `categorical(i)` to cycle."""

_CONTROL_POINTS = (
    # lightness, chroma, hue in degrees: indigo, violet, red, orange, pale yellow
    (0.17, 0.05, 285.0),
    (0.32, 0.24, 292.0),
    (0.56, 0.31, 2.0),
    (0.78, 0.21, 52.0),
    (0.97, 0.08, 102.0),
)

_OKLAB_TO_LMS = np.array(
    [
        [1.0, 0.3963377774, 0.2158037573],
        [1.0, -0.1055613458, -0.0638541728],
        [1.0, -0.0894841775, -1.2914855480],
    ]
)
_LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def oklab_to_srgb(lab: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """OKLab to gamma-encoded sRGB in [0, 1]; colours outside the gamut are clipped."""
    linear = (lab @ _OKLAB_TO_LMS.T) ** 3 @ _LMS_TO_RGB.T
    linear = np.clip(linear, 0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.power(linear, 1 / 2.4) - 0.055)


def srgb_to_oklab(rgb: Float[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """Gamma-encoded sRGB in [0, 1] to OKLab; the inverse of `oklab_to_srgb` inside the gamut."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, np.power((rgb + 0.055) / 1.055, 2.4))
    lms = np.cbrt(linear @ np.linalg.inv(_LMS_TO_RGB).T)
    return lms @ np.linalg.inv(_OKLAB_TO_LMS).T


def _sequential_table() -> UInt8[np.ndarray, "256 3"]:
    lightness, chroma, hue = np.array(_CONTROL_POINTS).T
    angle = np.deg2rad(hue)
    points = np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], axis=-1)
    # A Bézier curve has no kinks, which the eye would see as bands.
    t = np.linspace(0.0, 1.0, 2049)[:, None]
    degree = len(points) - 1
    curve = sum(
        math.comb(degree, k) * t**k * (1 - t) ** (degree - k) * point
        for k, point in enumerate(points)
    )
    steps = np.linalg.norm(np.diff(curve, axis=0), axis=-1)
    length = np.concatenate([[0.0], np.cumsum(steps)])
    even = np.linspace(0.0, length[-1], 256)
    table = np.stack([np.interp(even, length, curve[:, k]) for k in range(3)], axis=-1)
    return np.round(oklab_to_srgb(table) * 255).astype(np.uint8)


SEQUENTIAL: UInt8[np.ndarray, "256 3"] = _sequential_table()
"""Dark indigo over violet, red and orange to pale yellow; read-only."""
SEQUENTIAL.setflags(write=False)


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
    index = np.round(normalise(values, vmin=vmin, vmax=vmax) * 255).astype(np.intp)
    return SEQUENTIAL[index]


def hex_to_rgb(colour: str) -> RGB:
    """`"#3366cc"` to `(51, 102, 204)`."""
    return tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))


def categorical(index: int) -> RGB:
    """The palette's colour number `index`, cycling."""
    return hex_to_rgb(CATEGORICAL[index % len(CATEGORICAL)])


def luminance(colour: RGB) -> float:
    """Relative luminance in [0, 1] (WCAG 2.2)."""
    channels = np.array(colour) / 255.0
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(first: RGB, second: RGB) -> float:
    """Contrast ratio in [1, 21] (WCAG 2.2)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def text_colour(background: RGB) -> RGB:
    """Black or white, whichever reads better on `background`."""
    black, white = (0, 0, 0), (255, 255, 255)
    return max((black, white), key=lambda ink: contrast(ink, background))
