"""POPE (arXiv 2305.10355): is an object in the image? Answers read and counted as LLaVA does.

The questions are the files `coco_pope_{random,popular,adversarial}.json`, JSON lines with
`question_id`, `image`, `text` and `label`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from perception_jax.data.sources import fields
from perception_jax.errors import DataError
from perception_jax.evals.vqa import asking

SPLITS = ("random", "popular", "adversarial")
"""Names of the files, by how the absent objects were chosen."""
SUFFIX = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 appends to each question."""
GREEDY = asking.Decoding(template="vicuna_v1", max_tokens=128)
"""How LLaVA-1.5 was asked; images are processed as the checkpoint says."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopeQuestion:
    """A line of a file.

    Attributes:
      id: split and number, "random/1".
      image: name of the file.
      text: the question.
      label: "yes" or "no".
    """

    id: str
    image: str
    text: str
    label: str


def read_questions(root: str | os.PathLike[str], split: str) -> tuple[PopeQuestion, ...]:
    """Reads `coco_pope_<split>.json`.

    Raises:
      DataError: a split that is none of `SPLITS`; the file cannot be read or a line is damaged; a
        question comes twice.
    """
    if split not in SPLITS:
        raise DataError(f"expected a split of {', '.join(SPLITS)}, found {split!r}.")
    path = pathlib.Path(root) / f"coco_pope_{split}.json"
    rows = asking.read_lines(
        path, "text", "label", question_id=fields.identity, image=fields.file_name
    )
    found = {}
    for row in rows:
        name = f"{split}/{row['question_id']}"
        if row["label"] not in ("yes", "no") or name in found:
            raise DataError(
                f"{path}: question {row['question_id']}: expected one line with the label yes or "
                f"no, found {row['label']!r}{' again' * (name in found)}."
            )
        found[name] = PopeQuestion(
            id=name, image=row["image"], text=row["text"], label=row["label"]
        )
    return tuple(found.values())


def read_llava_ids(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """The ids that LLaVA's questions file (`llava_pope_test.jsonl`) gives the questions of each
    split, in the order of the split's own file.

    Raises:
      DataError: the file cannot be read or a line is damaged.
    """
    found: dict[str, list[str]] = {}
    for row in asking.read_lines(path, "category", question_id=fields.identity):
        found.setdefault(row["category"], []).append(str(row["question_id"]))
    return {split: tuple(ids) for split, ids in found.items()}


def to_ask(
    questions: Sequence[PopeQuestion], images: str | os.PathLike[str], *, suffix: str = SUFFIX
) -> list[asking.BenchmarkQuestion]:
    """The questions with their images, for `asking.ask`.

    Args:
      images: folder of COCO's val2014.
    """
    folder = pathlib.Path(images)
    return [
        asking.BenchmarkQuestion(id=one.id, image=folder / one.image, prompt=one.text + suffix)
        for one in questions
    ]


def decode(text: str) -> bool:
    """Whether an answer says yes: unless its first sentence has the word No, no or not.

    Words are what single spaces separate, so that "NO", "Nope" and "None" are yes.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopeScores:
    """Counts with "yes" as the positive class, and fractions of them.

    A fraction whose denominator is 0 is NaN; the authors' script fails there.
    """

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return _ratio(self.true_positive + self.true_negative, self._total)

    @property
    def precision(self) -> float:
        """Share of right ones among the answers yes."""
        return _ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> float:
        """Share of questions with the label yes that are answered yes."""
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        """Share of answers yes."""
        return _ratio(self.true_positive + self.false_positive, self._total)

    @property
    def _total(self) -> int:
        return sum(dataclasses.astuple(self))

    def to_dict(self) -> dict[str, float]:
        """All fractions; the published 85.9 of LLaVA-1.5 is the mean F1 of the three splits."""
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        return {name: getattr(self, name) for name in names} | dataclasses.asdict(self)

    def printed(self) -> str:
        """The text that the authors' script prints."""
        counts = (
            self.true_positive,
            self.false_positive,
            self.true_negative,
            self.false_negative,
        )
        short = (self.f1, self.accuracy, self.precision, self.recall, self.yes_ratio)
        lines = [
            "TP\tFP\tTN\tFN\t",
            "\t".join(map(str, counts)),
            f"Accuracy: {self.accuracy}",
            f"Precision: {self.precision}",
            f"Recall: {self.recall}",
            f"F1 score: {self.f1}",
            f"Yes ratio: {self.yes_ratio}",
            ", ".join(f"{value:.3f}" for value in short),
        ]
        return "".join(f"{line}\n" for line in lines)


def score(answers: Sequence[str], labels: Sequence[str]) -> PopeScores:
    """Scores answers.

    Args:
      labels: "no", or anything else for yes.

    Raises:
      DataError: none, or another number of labels.
    """
    if len(answers) != len(labels) or not answers:
        raise DataError(
            f"expected one answer for each label, found {len(answers)} answers and {len(labels)} "
            "labels."
        )
    pairs = [(decode(text), label != "no") for text, label in zip(answers, labels, strict=True)]
    return PopeScores(
        true_positive=pairs.count((True, True)),
        false_positive=pairs.count((True, False)),
        true_negative=pairs.count((False, False)),
        false_negative=pairs.count((False, True)),
    )


def answer_rows(
    questions: Sequence[PopeQuestion], outputs: Sequence[str], *, model: str
) -> list[dict[str, Any]]:
    """The lines of an answers file: `question_id` with the split, `prompt`, `text`, `model_id`."""
    return [
        {"question_id": one.id, "prompt": one.text, "text": text, "model_id": model}
        for one, text in zip(questions, outputs, strict=True)
    ]


def _ratio(part: int | float, whole: int | float) -> float:
    return part / whole if whole else float("nan")
