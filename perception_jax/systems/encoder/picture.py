"""Draws the maps of an image encoder: panels with captions, headings and a legend.

Letters: C side of a panel.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from perception_jax.systems.encoder.predict import EncoderPrediction, TextScore
from perception_jax.viz import overlay, sheet

_COLUMNS = 4
"""Largest number of panels in a row."""
_SMOOTH = 0.25
"""Blur of input gradients, in patches, which suppresses single pixels."""
_RELEVANCE = "Relevance of the patches for the text: gradient times attention"
_GRADIENT = "Pixels that change the score most: input gradient, smoothed"


def draw(prediction: EncoderPrediction, name: str) -> UInt8[np.ndarray, "_ _ 3"]:
    """Draws a whole prediction; `name` is the image's."""
    sections = [("", _own(prediction, name))]
    shown = prediction.picture
    smooth = _SMOOTH * prediction.input_size[0] / prediction.attention.shape[1]
    relevance = [overlay.over_grey(shown, one) for one in prediction.relevance]
    gradient = [
        overlay.over_grey(shown, overlay.blurred(one, smooth)) for one in prediction.gradient
    ]
    captions = ["\n".join(_words(score)) for score in prediction.scores]
    if len(captions) == 1:
        both = [(relevance[0], _RELEVANCE), (gradient[0], _GRADIENT)]
        sections.append((", ".join(_words(prediction.scores[0])), both))
    elif captions:
        sections.append((_RELEVANCE, list(zip(relevance, captions, strict=True))))
        sections.append((_GRADIENT, list(zip(gradient, captions, strict=True))))
    columns = max(len(sections[0][1]), min(len(captions), _COLUMNS))
    width = sheet.width_of(columns)
    parts = []
    for heading, panels in sections:
        parts += [sheet.heading(heading, width)] if heading else []
        parts.append(sheet.panels(panels, columns=columns))
    return sheet.stacked([*parts, sheet.legend(width)], width)


def _own(prediction: EncoderPrediction, name: str) -> list[sheet.Panel]:
    """The panels that need no text."""
    original, given = prediction.sizes()
    shown, rgb = prediction.picture, prediction.components
    colours = np.stack([overlay.enlarged(rgb[..., k], sheet.PANEL) for k in range(3)], axis=-1)
    features = 0.75 * np.clip(colours, 0, 1) * 255 + 0.25 * overlay.grey(shown)
    return [
        (shown, f"{name}\n{original} pixels\nmodel input: {given}"),
        (
            overlay.over_grey(shown, prediction.attention),
            f"Attention of the {prediction.attention_of}, mean over heads",
        ),
        (
            np.round(features).astype(np.uint8),
            "Patch features: three principal components as red, green and blue; equal "
            "colours mean similar features",
        ),
    ]


def _words(score: TextScore) -> tuple[str, str]:
    fit = f"cosine {score.cosine:.3f}"
    if score.probability is not None:
        fit += f", probability {score.probability:.1%}"
    return f"“{score.text}”", fit
