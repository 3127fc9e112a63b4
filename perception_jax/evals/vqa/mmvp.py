"""MMVP (arXiv 2401.06209): pairs of images that look alike to CLIP, with one question each pair.

A pair counts if both of its questions are right; guessing gives 25 %. The dataset is a folder with
`Questions.csv` and 300 images. Answers are graded by a rule (ours), or by a language model as in
the authors' script (`judging`).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from perception_jax.data.sources import fields
from perception_jax.errors import DataError
from perception_jax.evals.intervals import wilson_interval
from perception_jax.evals.predictions import Prediction
from perception_jax.evals.vqa import asking, judging

PATTERNS = (
    "Orientation and Direction",
    "Presence of Specific Features",
    "State and Condition",
    "Quantity and Count",
    "Positional and Relational Context",
    "Color and Appearance",
    "Structural and Physical Characteristics",
    "Text",
    "Viewpoint and Perspective",
)
"""The nine visual patterns, in the paper's order."""
CHANCE = 0.25
"""Pair accuracy of guessing."""
REFERENCE = asking.Decoding(
    template="llava_v1", temperature=0.2, top_k=50, max_tokens=1024, image_mode="hf_crop"
)
"""How the authors' script asks: sampled, with another template and another crop than LLaVA-1.5 was
trained with, so that its score changes from run to run."""
GREEDY = dataclasses.replace(REFERENCE, temperature=0.0, top_k=None)
"""The same without sampling."""
CORRECTED_PAIRS = (49, 139)
"""Pairs (from 0) whose two labels public reports call exchanged: questions 99/100 and 279/280."""

_FOLDERS = ("MMVP Images", "MMVP_Images", "images")
_OPTION = re.compile(r"\(([ab])\)\s*(.*?)(?=\s*\([ab]\)|$)", re.DOTALL | re.IGNORECASE)
_FIRST = re.compile(r"^\W*(?:\(([ab])\)|([ab])(?=[.,):]|\s*$)|(b)(?=\s))")
_LETTER = re.compile(r"\(([ab])\)")
_SYSTEM = (
    "You are a helpful and precise assistant for checking the quality of the answer. Please answer "
    "in only yes or no."
)
UNDETERMINED = "Could not determine yes or no."
"""Grade of a judge's reply that is neither yes nor no."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MmvpQuestion:
    """A row of `Questions.csv`.

    Attributes:
      number: of the row, from 1, which is also the name of the image.
      question: without the options.
      options: "(a) … (b) …".
      answer: "(a)" or "(b)".
    """

    number: int
    question: str
    options: str
    answer: str

    @property
    def prompt(self) -> str:
        """Question and options, as the model gets them after the image."""
        return f"{self.question} {self.options}"


def read_questions(
    root: str | os.PathLike[str], *, corrected: bool = False
) -> tuple[MmvpQuestion, ...]:
    """Reads `Questions.csv`; the spelling of its first column does not matter.

    Args:
      root: the dataset's folder.
      corrected: exchanges the labels of `CORRECTED_PAIRS`. Published results use the original ones.

    Raises:
      DataError: the file cannot be read, lacks a column, or has a label other than (a) and (b).
    """
    path = pathlib.Path(root) / "Questions.csv"
    found = []
    for number, (line, (question, options, answer)) in enumerate(
        asking.read_csv(path, "Question", "Options", "Correct Answer"), 1
    ):
        if answer.strip().lower() not in ("(a)", "(b)"):
            raise fields.fail(f"{path}:{line}: Correct Answer", '"(a)" or "(b)"', answer)
        found.append(MmvpQuestion(number=number, question=question, options=options, answer=answer))
    if corrected:
        for pair in CORRECTED_PAIRS:
            if len(found) < 2 * pair + 2:
                raise DataError(
                    f"{path}: expected the {2 * CORRECTED_PAIRS[-1] + 2} rows and more of MMVP to "
                    f"correct, found {len(found)}."
                )
            first, second = found[2 * pair : 2 * pair + 2]
            found[2 * pair] = dataclasses.replace(first, answer=second.answer)
            found[2 * pair + 1] = dataclasses.replace(second, answer=first.answer)
    return tuple(found)


def to_ask(
    root: str | os.PathLike[str], questions: Sequence[MmvpQuestion]
) -> list[asking.BenchmarkQuestion]:
    """The questions with their images, for `asking.ask`.

    Raises:
      DataError: the folder of images is missing.
    """
    folder = asking.find_folder(pathlib.Path(root), _FOLDERS)
    return [
        asking.BenchmarkQuestion(
            id=str(one.number), image=folder / f"{one.number}.jpg", prompt=one.prompt
        )
        for one in questions
    ]


def answer_rows(
    questions: Sequence[MmvpQuestion], predictions: Sequence[Prediction], *, model: str
) -> list[dict[str, Any]]:
    """The lines of the authors' answers file: `question_id`, `prompt`, `answer`, `response`,
    `answer_id`, `model_id`, in this order."""
    return [
        {
            "question_id": one.number,
            "prompt": one.prompt,
            "answer": one.answer,
            "response": prediction.output,
            "answer_id": asking.answer_id(prediction),
            "model_id": model,
        }
        for one, prediction in zip(questions, predictions, strict=True)
    ]


def read_answers(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads an answers file, ours or that of the authors' script.

    Raises:
      DataError: a line is damaged or lacks a key.
    """
    return asking.read_lines(path, "prompt", "answer", "response", question_id=fields.integer)


def with_labels(
    rows: Sequence[Mapping[str, Any]], questions: Sequence[MmvpQuestion]
) -> list[dict[str, Any]]:
    """The rows of an answers file with the labels of these questions, e.g. the corrected ones.

    Raises:
      DataError: a row is of another question.
    """
    if [row["question_id"] for row in rows] != [one.number for one in questions]:
        raise DataError(
            f"expected the answers to questions 1 to {len(questions)} in order, found "
            f"{len(rows)} answers to others; check that answers and questions belong together"
        )
    return [{**row, "answer": one.answer} for row, one in zip(rows, questions, strict=True)]


# --- Grading by rule -----------------------------------------------------------------------------


def options_of(text: str) -> dict[str, str]:
    """The options of a question by letter, from "(a) Open (b) Closed" or a prompt that ends so."""
    return {letter.lower(): option for letter, option in _OPTION.findall(text)}


def decode(response: str, options: Mapping[str, str]) -> str | None:
    """The option that a response chooses, "a" or "b"; None if that is undecided.

    The first that applies: a letter at the beginning (a bare "a" before a word is an article); one
    letter in brackets; the text of exactly one option, as whole words.
    """
    lowered = response.lower()
    if first := _FIRST.match(lowered):
        return next(letter for letter in first.groups() if letter)
    letters = set(_LETTER.findall(lowered))
    if len(letters) == 1:
        return letters.pop()
    said = [letter for letter, text in options.items() if _contains(response, text)]
    return said[0] if len(said) == 1 else None


def grade_by_rule(row: Mapping[str, Any]) -> bool:
    """Whether the response of a row of an answers file is right; an undecided one is not."""
    letter = decode(row["response"], options_of(row["prompt"]))
    return letter is not None and f"({letter})" == row["answer"].strip().lower()


def _contains(response: str, option: str) -> bool:
    words = _normal(option)
    return bool(words) and bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", _normal(response)))


def _normal(text: str) -> str:
    return re.sub(r"^[\W_]+|[\W_]+$", "", " ".join(text.lower().split()))


# --- Grading by a language model ----------------------------------------------------------------


def grading_request(row: Mapping[str, Any], *, model: str = judging.MODEL) -> dict[str, Any]:
    """The body of the authors' request for a row of an answers file."""
    user = (
        f"Given the following question {row['prompt']}, the correct answer is {row['answer']}. "
        f"Does the following answer correctly answers the question, answer:{row['response']}?"
    )
    return judging.chat(_SYSTEM, user, model=model, temperature=0.2)


def grading_requests(
    rows: Sequence[Mapping[str, Any]], *, model: str = judging.MODEL
) -> list[judging.Request]:
    """A request for each row, named by its question."""
    return [
        judging.Request(id=str(row["question_id"]), body=grading_request(row, model=model))
        for row in rows
    ]


def grade_of_reply(reply: str) -> str:
    """The authors' reading of a judge's reply: the reply in lower case if it is yes or no (a line
    end may follow), else `UNDETERMINED`. Only exactly "yes" counts as right."""
    return reply.lower() if re.match("^(yes|no)$", reply, re.IGNORECASE) else UNDETERMINED


# --- Scores --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class PairScores:
    """Scores of pairs of questions; fractions.

    Attributes:
      right: whether each question is; an odd one at the end counts for no pair.
    """

    right: Bool[np.ndarray, " n"]

    @property
    def pairs(self) -> Bool[np.ndarray, " p"]:
        """Whether both questions of each pair are right."""
        whole = self.right[: len(self.right) // 2 * 2]
        return whole.reshape(-1, 2).all(axis=1)

    @property
    def pair_accuracy(self) -> float:
        """Share of right pairs."""
        return float(self.pairs.sum() / len(self.pairs))

    @property
    def question_accuracy(self) -> float:
        """Share of right questions."""
        return float(self.right.mean())

    def printed(self) -> str:
        """The line that the authors' script prints."""
        return f"The accuracy is {self.pair_accuracy}"

    def to_dict(self) -> dict[str, Any]:
        """Accuracies, the 95 % Wilson interval of the pairs, and counts."""
        correct, total = int(self.pairs.sum()), len(self.pairs)
        return {
            "pair_accuracy": self.pair_accuracy,
            "pair_interval": list(wilson_interval(correct, total)),
            "pairs": total,
            "question_accuracy": self.question_accuracy,
            "questions": len(self.right),
        }


def pair_scores(right: Sequence[bool]) -> PairScores:
    """Scores of graded questions, in the order of the file.

    Raises:
      DataError: fewer than two.
    """
    if len(right) < 2:
        raise DataError(f"expected at least two graded answers, found {len(right)}.")
    return PairScores(np.array(right, bool))


def read_patterns(path: str | os.PathLike[str], pairs: int) -> tuple[str, ...]:
    """Reads the pattern of each pair: a JSON list of names. The authors published no such list.

    Raises:
      DataError: the file cannot be read, or has another number of pairs.
    """
    found = fields.list_of(fields.text)(fields.read_json(path), str(path))
    if len(found) != pairs:
        raise DataError(
            f"{path}: expected the pattern of each of {pairs} pairs, found {len(found)}."
        )
    return found


def by_pattern(scores: PairScores, patterns: Sequence[str]) -> dict[str, float]:
    """Pair accuracy of each pattern: those of the paper in its order, then others by name.

    Args:
      patterns: of each pair.

    Raises:
      DataError: another number of pairs.
    """
    if len(patterns) != len(scores.pairs):
        raise DataError(
            f"expected the pattern of each of {len(scores.pairs)} pairs, found {len(patterns)}."
        )
    names = np.array(patterns)
    known = [name for name in PATTERNS if name in patterns]
    others = sorted(set(patterns) - set(known))
    return {name: float(scores.pairs[names == name].mean()) for name in known + others}


def pearson(first: Float[np.ndarray, " k"], second: Float[np.ndarray, " m"]) -> float:
    """Pearson's correlation, e.g. of two models' accuracies per pattern.

    Raises:
      DataError: fewer than two values, of different number, or a constant one.
    """
    if len(first) != len(second) or len(first) < 2:
        raise DataError(
            f"expected two or more values of both, found {len(first)} and {len(second)}."
        )
    x, y = (np.asarray(one, np.float64) - np.mean(one, dtype=np.float64) for one in (first, second))
    spread = np.sqrt((x @ x) * (y @ y))
    if spread == 0:
        raise DataError("expected values that differ, found a constant: it has no correlation.")
    return float((x @ y) / spread)
