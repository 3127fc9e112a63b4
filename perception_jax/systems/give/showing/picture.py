"""A prediction of GiVE as one picture: a column for each instruction, the image at their left.

Letters: C side of a panel, w width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from perception_jax.systems.give.showing.prediction import Candidate, Prediction, Told
from perception_jax.viz import patch_maps, sheet
from perception_jax.viz.sheet import ShareBar, share_bars

COLUMNS = 4
"""Most instructions side by side."""
CANDIDATES = 10
"""Most candidates in the list."""

_PLACES = "Where the object is, if it is there: share of each patch"
_PRESENCE = "What speaks for the object's presence: gradient times attention"
_COSINE = "What speaks for the instruction: gradient times attention of the cosine"
_ATTENTION = "Attention of the {}, mean over heads"

Strip = UInt8[np.ndarray, "_ _ 3"]
_Row = tuple[str, list[sheet.Panel]]


def draw(prediction: Prediction, name: str) -> UInt8[np.ndarray, "_ _ 3"]:
    """All that `prediction` holds; `name` is the image's."""
    told = prediction.told
    width = sheet.width_of(1 + min(len(told), COLUMNS))
    parts = [sheet.heading(_title(prediction, name), width)]
    if prediction.candidates:
        parts += _ranking(prediction.candidates, width)
    for start in range(0, len(told), COLUMNS):
        parts += _block(prediction, told[start : start + COLUMNS], width)
    return sheet.stacked([*parts, sheet.legend(width)], width)


def _title(prediction: Prediction, name: str) -> str:
    # The font has no multiplication sign.
    original, given = (f"{w} x {h}" for w, h in (prediction.image_size, prediction.input_size))
    strength = "" if prediction.alpha == 1 else f", strength {prediction.alpha:g}"
    return f"{name}: {original} pixels, model input {given}{strength}"


def _block(prediction: Prediction, told: Sequence[Told], width: int) -> list[Strip]:
    """Some instructions beside the image: what they are, and a row for each kind of map."""
    shown = prediction.picture
    rows = _rows(prediction, told)
    blank = (np.full_like(shown, sheet.PAPER[0]), "")
    own = (patch_maps.over(shown, prediction.attention), "Without an instruction")
    left = [(shown, "The image, as far as patches cover it"), *[blank] * (len(rows) - 2), own]
    parts = [_headers(told)]
    for (text, panels), first in zip(rows, left, strict=True):
        parts += [
            sheet.line(text, width, indent=sheet.PANEL + sheet.GAP),
            sheet.panels([first, *panels], columns=1 + len(told)),
        ]
    return parts


def _rows(prediction: Prediction, told: Sequence[Told]) -> list[_Row]:
    """Each kind of map: what it is, and one panel an instruction; the first with what fits."""
    shown, trained = prediction.picture, all(one.presence is not None for one in told)
    relevance = [patch_maps.over(shown, one.relevance) for one in told]
    attention = [patch_maps.over(shown, one.attention) for one in told]
    rows = [
        (_PRESENCE if trained else _COSINE, relevance),
        (_ATTENTION.format(prediction.attention_of), attention),
    ]
    if all(one.places is not None for one in told):
        places = [patch_maps.over(shown, one.places) for one in told]
        rows.insert(0, (_PLACES, places))
    captions = [[_fit(one) for one in told], *[[""] * len(told)] * (len(rows) - 1)]
    return [
        (text, list(zip(panels, words, strict=True)))
        for (text, panels), words in zip(rows, captions, strict=True)
    ]


def _fit(told: Told) -> str:
    """The nearest captions, and the cosines."""
    lines = [f"{one.cosine:.2f}  {one.caption}" for one in told.captions]
    lines.append(
        f"Cosine with the instruction {told.cosine:.2f}; blank image {told.cosine_blank:.2f}, "
        f"not steered {told.cosine_static:.2f}"
    )
    return "\n".join(lines)


def _headers(told: Sequence[Told]) -> Strip:
    """The instructions, each with its presence, above their columns."""
    width = sheet.PANEL + sheet.GAP
    cells = [sheet.heading("", width)]
    for one in told:
        parts = [sheet.heading(f"“{one.instruction}”", width)]
        if one.presence is not None:
            there = one.presence > 0.5
            note = f"{'there' if there else 'not there'}, {one.presence:.0%}"
            bar = ShareBar(name="", share=one.presence, note=note, strong=there)
            parts.append(share_bars([bar], width, name_width=0, bar_width=sheet.PANEL // 2))
        cells.append(sheet.stacked(parts, width))
    height = max(map(len, cells))
    return np.concatenate([_lowered(cell, height) for cell in cells], axis=1)


def _lowered(cell: UInt8[np.ndarray, "_ w 3"], height: int) -> UInt8[np.ndarray, "{height} w 3"]:
    missing = height - len(cell)
    return np.pad(cell, ((missing, 0), (0, 0), (0, 0)), constant_values=sheet.PAPER[0])


def _ranking(candidates: Sequence[Candidate], width: int) -> list[Strip]:
    """The most likely ones with their probabilities."""
    column = sheet.PANEL // 2
    names = sheet.PANEL - sheet.GAP
    rows = [
        ShareBar(
            name=one.name,
            share=one.presence,
            note=f"{one.presence:.0%}, calibrated cosine {one.calibrated_cosine:+.2f}",
            strong=one.presence > 0.5,
        )
        for one in candidates[:CANDIDATES]
    ]
    return [
        sheet.line(f"The most likely of {len(candidates)} candidates", width),
        share_bars(rows, width, name_width=names, bar_width=column),
    ]
