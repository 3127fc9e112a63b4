"""Our numbers beside the paper's, as text; percent in tables, fractions everywhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from perception_jax.evals.vqa.mmvp import PATTERNS
from perception_jax.evals.vqa.mmvp_vlm import VlmScores
from perception_jax.systems.mmvp import published

_NOTHING = "–"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as lines; the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VlmResult:
    """A model's scores on MMVP-VLM.

    Attributes:
      scores: of its predictions.
      row: the model's row of the paper's table; "" for none.
      parameters: number of its weights.
      pixels: side of its images.
    """

    scores: VlmScores
    row: str
    parameters: int
    pixels: int


def vlm_table(found: Mapping[str, VlmResult]) -> str:
    """The layout of the paper's table of MMVP-VLM, by the name of each model."""
    rows = [["model", "px", "params M", "IN-1k", *published.SHORT_PATTERNS, "avg"]]
    for name, one in found.items():
        values = [100 * value for value in (*one.scores.accuracy.values(), one.scores.mean)]
        size = f"{one.parameters / 1e6:.1f}"
        rows.append([name, str(one.pixels), size, _NOTHING, *_percents(values)])
        if one.row:
            paper = published.MMVP_VLM[one.row]
            head = [str(paper.pixels), f"{paper.parameters:.1f}", f"{paper.imagenet:.1f}"]
            rows.append(["  paper", *head, *_percents([*paper.patterns, paper.mean])])
        if one.row == published.CLIP_CURVE[0]:
            script = published.SCRIPT_OPENAI_L14
            rows.append(
                ["  authors' script", *[_NOTHING] * 3, *_percents([*script, np.mean(script)])]
            )
    chance = [25.0] * (len(published.SHORT_PATTERNS) + 1)
    rows.append(["guessing", *[_NOTHING] * 3, *_percents(chance)])
    return aligned(rows)


def beside(name: str, value: float, metric: str, others: Mapping[str, float]) -> str:
    """A score in percent among the published ones, the best first.

    Args:
      name: of the model or the kind of score.
      metric: head of the column.
      others: published scores by the name of the model.
    """
    rows = sorted(
        [(value, f"{name} (this run)"), *((v, k) for k, v in others.items())], reverse=True
    )
    return aligned([["model", metric], *([model, f"{score:.1f}"] for score, model in rows)])


def pattern_table(accuracy: Mapping[str, float]) -> str:
    """Pair accuracy on MMVP by pattern beside the published ones, and the correlations with CLIP.

    A pattern that the paper does not have stands alone; the correlation needs all nine.
    """
    others = published.MMVP_BY_PATTERN
    curve = published.clip_curve()
    rows = [["pattern", "this run", "CLIP", *others]]
    for k, pattern in enumerate(PATTERNS):
        own = f"{100 * accuracy[pattern]:.1f}" if pattern in accuracy else _NOTHING
        rows.append([pattern, own, *_percents([curve[k], *(one[k] for one in others.values())])])
    for pattern in accuracy:
        if pattern not in PATTERNS:
            blank = [_NOTHING] * (1 + len(others))
            rows.append([pattern, f"{100 * accuracy[pattern]:.1f}", *blank])
    own, ours = _NOTHING, [accuracy.get(pattern) for pattern in PATTERNS]
    if None not in ours and len(set(ours)) > 1:
        own = f"{published.correlation_with_clip(ours):.2f}"
    printed = [f"{published.CORRELATION[name]:.2f}" for name in others]
    rows.append(["correlation with CLIP", own, "1.00", *printed])
    return aligned(rows)


def _percents(values: Sequence[float]) -> list[str]:
    return [f"{value:.1f}" for value in values]
