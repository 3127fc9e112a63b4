"""Draws a prediction of GiVE: the image at the left, then a column for each instruction.

Letters: C side of a panel, w width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from perception_jax.systems.give.prediction import Candidate, GivePrediction, InstructionPrediction
from perception_jax.viz import overlay, sheet
from perception_jax.viz.sheet import ShareBar, share_bars

COLUMNS = 4
"""Largest number of instructions side by side."""
CANDIDATES = 10
"""Largest number of candidates in the list."""

_PLACES = "Place of the object, if it is present: share of each patch"
_PRESENCE = "Relevance for the object's presence: gradient times attention"
_COSINE = "Relevance for the cosine with the instruction: gradient times attention"
_ATTENTION = "Attention of the {}, mean over heads"

Strip = UInt8[np.ndarray, "_ _ 3"]
_Row = tuple[str, list[sheet.Panel]]


def draw(prediction: GivePrediction, name: str) -> UInt8[np.ndarray, "_ _ 3"]:
    """Draws a whole prediction; `name` is the image's."""
    instructions = prediction.instructions
    width = sheet.width_of(1 + min(len(instructions), COLUMNS))
    parts = [sheet.heading(_title(prediction, name), width)]
    if prediction.candidates:
        parts += _ranking(prediction.candidates, width)
    for start in range(0, len(instructions), COLUMNS):
        parts += _block(prediction, instructions[start : start + COLUMNS], width)
    return sheet.stacked([*parts, sheet.legend(width)], width)


def _title(prediction: GivePrediction, name: str) -> str:
    original, given = prediction.sizes()
    strength = "" if prediction.alpha == 1 else f", strength {prediction.alpha:g}"
    return f"{name}: {original} pixels, model input {given}{strength}"


def _block(
    prediction: GivePrediction, instructions: Sequence[InstructionPrediction], width: int
) -> list[Strip]:
    """Some instructions beside the image: their headings, and a row for each type of map."""
    shown = prediction.picture
    rows = _rows(prediction, instructions)
    blank = (np.full_like(shown, sheet.PAPER[0]), "")
    own = (overlay.over_grey(shown, prediction.attention), "Without an instruction")
    left = [(shown, "The image, as far as patches cover it"), *[blank] * (len(rows) - 2), own]
    parts = [_headers(instructions)]
    for (text, panels), first in zip(rows, left, strict=True):
        parts += [
            sheet.line(text, width, indent=sheet.PANEL + sheet.GAP),
            sheet.panels([first, *panels], columns=1 + len(instructions)),
        ]
    return parts


def _rows(prediction: GivePrediction, instructions: Sequence[InstructionPrediction]) -> list[_Row]:
    """Each type of map: its title, and one panel an instruction; the first with the scores."""
    trained = all(one.presence is not None for one in instructions)
    types = {
        "places": _PLACES,
        "relevance": _PRESENCE if trained else _COSINE,
        "attention": _ATTENTION.format(prediction.attention_of),
    }
    if any(one.places is None for one in instructions):
        del types["places"]
    first = next(iter(types))

    def panel(one: InstructionPrediction, name: str) -> sheet.Panel:
        shown = overlay.over_grey(prediction.picture, getattr(one, name))
        return shown, _scores(one) if name == first else ""

    return [(text, [panel(one, name) for one in instructions]) for name, text in types.items()]


def _scores(one: InstructionPrediction) -> str:
    """The nearest captions, and the cosines."""
    lines = [f"{item.cosine:.2f}  {item.caption}" for item in one.captions]
    lines.append(
        f"Cosine with the instruction {one.cosine:.2f}; blank image {one.cosine_blank:.2f}, "
        f"without the instruction {one.cosine_static:.2f}"
    )
    return "\n".join(lines)


def _headers(instructions: Sequence[InstructionPrediction]) -> Strip:
    """The instructions, each with its presence, above their columns."""
    width = sheet.PANEL + sheet.GAP
    cells = [sheet.heading("", width)]
    for one in instructions:
        parts = [sheet.heading(f"“{one.instruction}”", width)]
        if one.presence is not None:
            present = one.presence > 0.5
            note = f"{'present' if present else 'absent'}, {one.presence:.0%}"
            bar = ShareBar(name="", share=one.presence, note=note, strong=present)
            parts.append(share_bars([bar], width, name_width=0, bar_width=sheet.PANEL // 2))
        cells.append(sheet.stacked(parts, width))
    height = max(map(len, cells))
    return np.concatenate([sheet.padded_above(cell, height) for cell in cells], axis=1)


def _ranking(candidates: Sequence[Candidate], width: int) -> list[Strip]:
    """The most likely candidates with their probabilities."""
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
