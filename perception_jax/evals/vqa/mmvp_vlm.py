"""MMVP-VLM (arXiv 2401.06209): which of two images does each of two statements describe?

135 pairs of images, 15 for each of nine patterns, for models with an image and a text tower. As in
the authors' script the pattern follows from the place in the file, the right image from whether the
question id is odd, and equal scores choose the second image. Guessing gives 25 %.

Letters: P pairs, t statements of a pair, i images of a pair, d width.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from perception_jax.errors import DataError
from perception_jax.evals.intervals import wilson_interval
from perception_jax.evals.vqa import asking

PREFIX = "a photo of "
"""Stands before each statement."""
CATEGORIES = (
    "Orientation and Direction",
    "Presence of Specific Features",
    "State and Condition",
    "Quantity and Count",
    "Positional and Relational Context",
    "Color and Appearance",
    "Structural Characteristics",
    "Texts",
    "Viewpoint and Perspective",
)
"""Names of the patterns in the authors' results, in the order of the file."""

_FOLDERS = ("MLLM_VLM Images", "MMVP_VLM_Images", "MMVP_VLM Images", "MLLM_VLM_Images")
_OUTPUT = ("qid1", "qid2", "pred1", "pred2", "gt1", "gt2", "q1score", "q2score")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """Two consecutive rows of `Questions.csv`.

    Attributes:
      ids: question ids.
      statements: without `PREFIX`.
      images: files; both lie in the folder that the type of the first row names.
    """

    ids: tuple[int, int]
    statements: tuple[str, str]
    images: tuple[pathlib.Path, pathlib.Path]

    @property
    def texts(self) -> tuple[str, str]:
        """The statements with their prefix."""
        return tuple(PREFIX + one for one in self.statements)


def read_pairs(root: str | os.PathLike[str]) -> tuple[Pair, ...]:
    """Reads the pairs; a row without a partner at the end is left out.

    Args:
      root: folder with `Questions.csv` and the images, whose folder has one of several names.

    Raises:
      DataError: the file cannot be read, an id is no whole number, or the folder of images is
        missing.
    """
    root = pathlib.Path(root)
    path, folder = root / "Questions.csv", asking.find_folder(root, _FOLDERS)
    rows = []
    for line, (number, kind, statement) in asking.read_csv(
        path, "Question ID", "Type", "Statement"
    ):
        if not number.strip().isdecimal():
            raise DataError(f"{path}:{line}: expected a whole number as id, found {number!r}.")
        if {"/", "\\"} & set(kind) or kind.strip() in ("", ".", ".."):
            raise DataError(f"{path}:{line}: expected a folder's name as Type, found {kind!r}.")
        rows.append((int(number), kind, statement))
    return tuple(
        Pair(
            ids=(first[0], second[0]),
            statements=(first[2], second[2]),
            images=tuple(folder / first[1] / f"{one[0]}.jpg" for one in (first, second)),
        )
        for first, second in zip(rows[::2], rows[1::2], strict=False)
    )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class VlmScores:
    """Scores of all pairs; fractions.

    Attributes:
      ids: question ids.
      share: of the first image in the softmax over both, for each statement.
    """

    ids: Int[np.ndarray, "P 2"]
    share: Float32[np.ndarray, "P t"]

    @property
    def chosen_first(self) -> Bool[np.ndarray, "P t"]:
        """Whether the first image is chosen; equal scores choose the second."""
        return self.share > 0.5

    @property
    def right_first(self) -> Bool[np.ndarray, "P t"]:
        """Whether the first image is right: the id is odd."""
        return self.ids % 2 == 1

    @property
    def correct(self) -> Bool[np.ndarray, " P"]:
        """Pairs in which both statements choose the right image."""
        return (self.chosen_first == self.right_first).all(axis=1)

    @property
    def accuracy(self) -> dict[str, float]:
        """Of each pattern: nine equal parts of the file, in order."""
        each = len(self.correct) // len(CATEGORIES)
        parts = self.correct[: each * len(CATEGORIES)].reshape(len(CATEGORIES), each)
        return dict(zip(CATEGORIES, (parts.sum(axis=1) / each).tolist(), strict=True))

    @property
    def mean(self) -> float:
        """Over the patterns, the average of the paper's table."""
        return float(np.mean(list(self.accuracy.values())))

    def to_dict(self) -> dict[str, Any]:
        """The mean, the 95 % Wilson interval of all pairs, and the accuracy of each pattern."""
        interval = wilson_interval(int(self.correct.sum()), len(self.correct))
        return {
            "mean": self.mean,
            "interval": list(interval),
            "pairs": len(self.correct),
            "accuracy": self.accuracy,
        }

    def output_csv(self) -> str:
        """The authors' `output.csv`: ids, chosen and right images, share of the first image."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_OUTPUT)
        for ids, chosen, right, share in zip(
            self.ids, self.chosen_first, self.right_first, self.share, strict=True
        ):
            images = ["img1" if first else "img2" for first in (*chosen, *right)]
            writer.writerow([*ids.tolist(), *images, *share.tolist()])
        return file.getvalue()


def score(
    ids: Sequence[Sequence[int]], cosines: Float[np.ndarray, "P t i"], logit_scale: float
) -> VlmScores:
    """Scores pairs from the cosines of statements and images; a logit bias changes nothing.

    Args:
      ids: of both questions of each pair.
      cosines: of each statement of a pair with both images of the pair.
      logit_scale: logarithm of the model's factor.

    Raises:
      DataError: fewer pairs than patterns, or a cosine that is not finite.
    """
    if len(ids) != len(cosines) or len(cosines) < len(CATEGORIES):
        raise DataError(
            f"expected at least {len(CATEGORIES)} pairs, one or more for each pattern, found "
            f"{len(cosines)} with {len(ids)} pairs of ids."
        )
    if not np.isfinite(cosines).all():
        pair = int(np.argwhere(~np.isfinite(cosines))[0, 0])
        raise DataError(f"expected finite cosines, found others in pair {pair}.")
    logits = np.exp(np.float32(logit_scale)) * np.asarray(cosines, np.float32)
    share = 1 / (1 + np.exp(logits[..., 1] - logits[..., 0]))
    return VlmScores(ids=np.asarray(ids, np.int64), share=share)


def cosines_of(
    images: Float[np.ndarray, "P i d"], texts: Float[np.ndarray, "P t d"]
) -> Float32[np.ndarray, "P t i"]:
    """Cosines within each pair of features of any length, float32."""
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts)]
    return np.einsum("pid,ptd->pti", *unit).astype(np.float32)
