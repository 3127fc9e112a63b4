"""A prediction as one picture: panels with captions, headings, and what the colours mean.

Letters: C side of a panel.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from perception_jax import viz
from perception_jax.systems.encoder.predict import PICTURE, Prediction, TextScore
from perception_jax.viz import colormap
from perception_jax.viz.grid import grid, wrap

_PAPER = (255, 255, 255)
_INK = (32, 34, 38)
_GAP = 14
_FONT = 15
_HEADING = 19
_COLUMNS = 4
"""Most panels in a row."""
_SMOOTH = 0.25
"""Blur of input gradients, in patches: what stands out is a place, not a speckle."""
_RELEVANCE = "Patches that speak for the text: gradient times attention"
_GRADIENT = "Pixels that change the score most: input gradient, smoothed"

Panel = tuple[UInt8[np.ndarray, "C C 3"], str]


def draw(prediction: Prediction, name: str) -> UInt8[np.ndarray, "_ _ 3"]:
    """All that `prediction` holds; `name` is the image's."""
    sections = [("", _own(prediction, name))]
    patch = prediction.input_size[0] / prediction.attention.shape[1]
    relevance = [_over(prediction.picture, one) for one in prediction.relevance]
    gradient = [
        _over(prediction.picture, _blurred(one, _SMOOTH * patch)) for one in prediction.gradient
    ]
    captions = ["\n".join(_words(score)) for score in prediction.scores]
    if len(captions) == 1:
        both = [(relevance[0], _RELEVANCE), (gradient[0], _GRADIENT)]
        sections.append((", ".join(_words(prediction.scores[0])), both))
    elif captions:
        sections.append((_RELEVANCE, list(zip(relevance, captions, strict=True))))
        sections.append((_GRADIENT, list(zip(gradient, captions, strict=True))))
    columns = max(len(sections[0][1]), min(len(captions), _COLUMNS))
    width = columns * (PICTURE + _GAP) + _GAP
    parts = []
    for heading, panels in sections:
        if heading:
            parts.append(_line(heading, width))
        images, texts = zip(*panels, strict=True)
        sheet = grid(images, texts, columns=columns, cell=PICTURE, gap=_GAP, font_size=_FONT)
        parts.append(_widened(sheet, width))
    return np.concatenate([*parts, _legend(width)])


def _own(prediction: Prediction, name: str) -> list[Panel]:
    """The panels that need no text."""
    # The font has no multiplication sign.
    original, given = (f"{w} x {h}" for w, h in (prediction.image_size, prediction.input_size))
    shown, rgb = prediction.picture, prediction.components
    colours = np.stack([_enlarged(rgb[..., k], PICTURE) for k in range(3)], axis=-1)
    features = 0.75 * np.clip(colours, 0, 1) * 255 + 0.25 * _grey(shown)
    return [
        (shown, f"{name}\n{original} pixels\nmodel input: {given}"),
        (
            _over(shown, prediction.attention),
            f"Attention of the {prediction.attention_of}, mean over heads",
        ),
        (
            np.round(features).astype(np.uint8),
            "Patch features: three principal components as red, green and blue; what has one "
            "colour looks alike to the model",
        ),
    ]


def _words(score: TextScore) -> tuple[str, str]:
    fit = f"cosine {score.cosine:.3f}"
    if score.probability is not None:
        fit += f", probability {score.probability:.1%}"
    return f"“{score.text}”", fit


def _over(
    picture: UInt8[np.ndarray, "C C 3"], values: Float[np.ndarray, "_ _"]
) -> UInt8[np.ndarray, "C C 3"]:
    """A map over the picture in grey, so that all colours are the map's."""
    low, high = float(values.min()), float(values.max())
    smooth = np.clip(_enlarged(values, len(picture)), low, high)
    return viz.heatmap(_grey(picture), smooth, vmin=low, vmax=high)


def _grey(picture: UInt8[np.ndarray, "C C 3"]) -> UInt8[np.ndarray, "C C 3"]:
    return np.array(Image.fromarray(picture).convert("L").convert("RGB"))


def _enlarged(values: Float[np.ndarray, "_ _"], side: int) -> Float[np.ndarray, "{side} {side}"]:
    """Bicubic: linear interpolation of a few patches shows their edges as diamonds."""
    picture = Image.fromarray(values.astype(np.float32))
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


def _blurred(values: Float[np.ndarray, "H W"], radius: float) -> Float[np.ndarray, "H W"]:
    # Pillow blurs bytes alone; 255 levels are more than the eye tells apart in a map.
    levels = Image.fromarray(np.round(255 * colormap.normalise(values)).astype(np.uint8))
    return np.asarray(levels.filter(ImageFilter.GaussianBlur(radius)), np.float32)


def _line(text: str, width: int) -> UInt8[np.ndarray, "_ {width} 3"]:
    """A heading above a row of panels, wrapped."""
    font, height = ImageFont.load_default(_HEADING), round(1.3 * _HEADING)
    lines = wrap(text, width - 2 * _GAP, font)
    strip = Image.new("RGB", (width, height * len(lines) + _GAP // 2), _PAPER)
    for k, line in enumerate(lines):
        place = (_GAP, _GAP // 2 + k * height)
        ImageDraw.Draw(strip).text(place, line, fill=_INK, font=font)
    return np.array(strip)


def _widened(sheet: UInt8[np.ndarray, "h _ 3"], width: int) -> UInt8[np.ndarray, "h {width} 3"]:
    missing = width - sheet.shape[1]
    return np.pad(sheet, ((0, 0), (0, missing), (0, 0)), constant_values=_PAPER[0])


def _legend(width: int) -> UInt8[np.ndarray, "_ {width} 3"]:
    """A bar of the colours with what its ends mean."""
    strip = Image.new("RGB", (width, _FONT + 2 * _GAP), _PAPER)
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(_FONT)
    bar = colormap.apply(np.tile(np.linspace(0, 1, PICTURE // 2), (_FONT, 1)))
    start = "Colours of a map: its lowest value"
    pen.text((_GAP, _GAP - 2), start, fill=_INK, font=font)
    x = 2 * _GAP + round(font.getlength(start))
    strip.paste(Image.fromarray(bar), (x, _GAP))
    end = "its highest; beneath them the image in grey"
    pen.text((x + PICTURE // 2 + _GAP, _GAP - 2), end, fill=_INK, font=font)
    return np.array(strip)
