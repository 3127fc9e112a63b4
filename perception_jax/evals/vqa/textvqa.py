"""TextVQA (arXiv 1904.08920), version 0.5.1: questions on text in images, soft accuracy.

The score is that of M4C (arXiv 1911.06258): answers are normalised as by VQA's server, and an
answer counts as much as the ten people's answers agree with it. Files: `TextVQA_0.5.1_val.json`,
and `TextVQA_Rosetta_OCR_v0.2_val.json` with the words that an OCR system read.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

from perception_jax.data.sources import fields
from perception_jax.errors import DataError
from perception_jax.evals.vqa import asking

PEOPLE = 10
"""Answers of each question."""
SUFFIX = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 appends to each question."""
GREEDY = asking.Decoding(template="vicuna_v1", max_tokens=128)
"""How LLaVA-1.5 was asked."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_->@`,?!<'
_DOT = re.compile(r"\.(?!\d)")
_MOST_DOTS = 32
"""The reference passes a flag of `re` as the number of dots to remove."""
_SHORT_FORMS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll
they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """Short forms by their spellings without one of the apostrophes."""
    found = {
        form[:k] + form[k + 1 :]: form
        for form in _SHORT_FORMS.split()
        for k, letter in enumerate(form)
        if letter == "'"
    }
    return found | {"somebody'd": "somebodyd"}  # so in the reference


_CONTRACTIONS = _contractions()


def normalise(answer: str) -> str:
    """An answer as VQA's server compares it: lower case, digits for number words, no articles and
    punctuation, apostrophes in short forms."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space else " ")
    cleaned = _DOT.sub("", cleaned, count=_MOST_DOTS)
    words = (_DIGITS.get(word, word) for word in cleaned.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Score of each normalised answer: the mean over the people left out in turn of
    min(1, matches among the others / 3).

    Raises:
      DataError: not ten answers.
    """
    if len(answers) != PEOPLE:
        raise DataError(f"expected the answers of {PEOPLE} people, found {len(answers)}.")
    counts = collections.Counter(map(normalise, answers))
    return {
        answer: sum(
            times * min(1.0, (count - (other == answer)) / 3) for other, times in counts.items()
        )
        / PEOPLE
        for answer, count in counts.items()
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextQuestion:
    """An annotated question.

    Attributes:
      id: unique.
      image: name of the image without its suffix.
      text: the question.
      answers: of ten people.
    """

    id: str
    image: str
    text: str
    answers: tuple[str, ...]


def read_questions(path: str | os.PathLike[str]) -> tuple[TextQuestion, ...]:
    """Reads the annotation file.

    Raises:
      DataError: it cannot be read, is damaged, or a question has not ten answers.
    """
    found = {}
    for where, row in _data(path):
        number, image, text, answers = fields.values(
            row,
            where,
            question_id=fields.identity,
            image_id=fields.file_name,
            question=fields.text,
            answers=fields.list_of(fields.any_text),
        )
        if len(answers) != PEOPLE or str(number) in found:
            raise DataError(
                f"{where}: expected a new question with {PEOPLE} answers, found question {number} "
                f"with {len(answers)}."
            )
        found[str(number)] = TextQuestion(id=str(number), image=image, text=text, answers=answers)
    return tuple(found.values())


def read_ocr_tokens(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """The words in each image from the OCR file, by the image's name without suffix.

    Raises:
      DataError: it cannot be read or is damaged.
    """
    return {
        fields.required(row, "image_id", fields.file_name, where): fields.required(
            row, "ocr_tokens", fields.list_of(fields.any_text), where
        )
        for where, row in _data(path)
    }


def prompt(question: str, tokens: Sequence[str] | None = None) -> str:
    """The prompt of LLaVA-1.5.

    Args:
      question: only its first letter is a capital in the prompt, as lmms-eval writes it.
      tokens: words that an OCR system read; None leaves them out.
    """
    hint = "" if tokens is None else f"\nReference OCR token: {', '.join(tokens)}"
    return f"{question.capitalize()}{hint}{SUFFIX}"


def to_ask(
    questions: Sequence[TextQuestion],
    images: str | os.PathLike[str],
    tokens: Mapping[str, Sequence[str]] | None = None,
) -> list[asking.BenchmarkQuestion]:
    """The questions with their images, for `asking.ask`.

    Args:
      tokens: of `read_ocr_tokens`, if the prompts hold them; an image without any has none.
    """
    folder = pathlib.Path(images)
    return [
        asking.BenchmarkQuestion(
            id=one.id,
            image=folder / f"{one.image}.jpg",
            prompt=prompt(one.text, None if tokens is None else tokens.get(one.image, ())),
        )
        for one in questions
    ]


def score(questions: Sequence[TextQuestion], outputs: Sequence[str]) -> float:
    """Mean soft accuracy, a fraction.

    Raises:
      DataError: no questions, or another number of outputs.
    """
    if len(questions) != len(outputs) or not questions:
        raise DataError(
            f"expected an answer to each question, found {len(outputs)} to {len(questions)}."
        )
    each = (
        soft_scores(one.answers).get(normalise(text), 0.0)
        for one, text in zip(questions, outputs, strict=True)
    )
    return sum(each) / len(questions)


def score_llava_file(
    questions: Sequence[TextQuestion], path: str | os.PathLike[str]
) -> tuple[float, int]:
    """Mean soft accuracy of LLaVA's answers file, and its number of answers.

    Its lines have `question_id` (the name of the image), `prompt` (whose first line, or second
    behind one of OCR tokens, is the question) and `text`.

    Raises:
      DataError: the file is damaged, or a line is of an unknown question.
    """
    known = {(one.image, one.text.lower()): one for one in questions}
    found, outputs = [], []
    for row in asking.read_lines(path, "prompt", "text", question_id=fields.identity):
        lines = row["prompt"].split("\n")
        text = lines[1] if lines[0].startswith("Reference OCR token:") else lines[0]
        key = (str(row["question_id"]), text.lower())
        if key not in known:
            raise DataError(f"{path}: expected answers to known questions, found {key}.")
        found.append(known[key])
        outputs.append(row["text"])
    return score(found, outputs), len(found)


def _data(path: str | os.PathLike[str]) -> list[tuple[str, Mapping]]:
    """The objects under "data", each with its place."""
    content = fields.mapping(fields.read_json(path), str(path))
    rows = fields.required(content, "data", fields.list_of(fields.mapping), str(path))
    if not rows:
        raise DataError(f"{path}: expected objects under data, found none.")
    return [(f"{path}: data[{k}]", row) for k, row in enumerate(rows)]
