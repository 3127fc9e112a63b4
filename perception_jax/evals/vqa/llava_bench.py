"""LLaVA-Bench: a language model compares answers with reference answers, on a scale from 1 to 10.

Two sets: "coco" (90 questions about 30 images, described to the judge by captions and boxes) and
"in_the_wild" (60 questions about 24 images, described by text). Files, all JSON lines: questions
(`question_id`, `image`, `category`, `text`), contexts, reference answers and the model's answers
(`question_id`, `text`). The judge is asked through files (`judging`).
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from perception_jax.data.sources import fields
from perception_jax.errors import DataError
from perception_jax.evals.vqa import asking, judging

Kind = Literal["coco", "in_the_wild"]
"""Which of the two sets."""

GREEDY = asking.Decoding(template="vicuna_v1", max_tokens=1024, image_mode="hf_crop")
"""How LLaVA was asked, with a plain centre crop."""

_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_ROLE = "Assistant"
_SHOWN = {
    "coco": (
        "the visual content in the image is represented with five descriptive sentences describing "
        "the same image and the bounding box coordinates of each object in the scene. These "
        "coordinates are in the form of bounding boxes, represented as (x1, y1, x2, y2) with "
        "floating numbers ranging from 0 to 1. These values correspond to the top left x, top left "
        "y, bottom right x, and bottom right y. \n"
    ),
    "in_the_wild": (
        "the visual content in the image is represented with a few sentences describing the "
        "image. \n"
    ),
}
_RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to "
    "the user question displayed above. The user asks the question on observing an image. For your "
    "reference, {shown}Please rate the helpfulness, relevance, accuracy, level of details of their "
    "responses. Each assistant receives an overall score on a scale of 1 to 10, where a higher "
    "score indicates better overall performance.\nPlease first output a single line containing "
    "only two values indicating the scores for Assistant 1 and 2, respectively. The two scores are "
    "separated by a space.\nIn the subsequent line, please provide a comprehensive explanation of "
    "your evaluation, avoiding any potential bias and ensuring that the order in which the "
    "responses were presented does not affect your judgment."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchQuestion:
    """A line of the questions file."""

    id: str
    image: str
    category: str
    text: str


def read_questions(path: str | os.PathLike[str]) -> tuple[BenchQuestion, ...]:
    """Reads a questions file.

    Raises:
      DataError: it cannot be read, a line is damaged, or an id comes twice.
    """
    rows = asking.read_lines(
        path, "category", "text", question_id=fields.identity, image=fields.file_name
    )
    ids = [str(row["question_id"]) for row in rows]
    if len(set(ids)) < len(ids):
        raise DataError(f"{path}: expected distinct ids, found some of {len(ids)} again.")
    return tuple(
        BenchQuestion(id=name, **{key: row[key] for key in ("image", "category", "text")})
        for name, row in zip(ids, rows, strict=True)
    )


def to_ask(
    questions: Sequence[BenchQuestion], images: str | os.PathLike[str]
) -> list[asking.BenchmarkQuestion]:
    """The questions with their images, for `asking.ask`."""
    folder = pathlib.Path(images)
    return [
        asking.BenchmarkQuestion(id=one.id, image=folder / one.image, prompt=one.text)
        for one in questions
    ]


def read_answers(
    path: str | os.PathLike[str], questions: Sequence[BenchQuestion]
) -> tuple[str, ...]:
    """The answer to each question from a file of answers, those of a model or the references.

    Raises:
      DataError: the file is damaged, or lacks an answer.
    """
    rows = asking.read_lines(path, "text", question_id=fields.identity)
    found = {str(row["question_id"]): row["text"] for row in rows}
    missing = [one.id for one in questions if one.id not in found]
    if missing:
        raise DataError(
            f"{path}: expected an answer to each question, found none to {missing[:3]}."
        )
    return tuple(found[one.id] for one in questions)


def read_contexts(path: str | os.PathLike[str], kind: Kind) -> dict[str, str]:
    """What the judge reads of each image, by its file name.

    Raises:
      DataError: the file is damaged.
    """
    found = {}
    for number, row in enumerate(asking.read_lines(path, image=fields.file_name), 1):
        where = f"{path}: object {number}"
        if kind == "coco":
            captions = fields.required(row, "captions", fields.list_of(fields.any_text), where)
            boxes = fields.required(row, "instances", fields.list_of(fields.mapping), where)
            lines = [f"{box['category']}: {box['bbox']}" for box in boxes]
            found[row["image"]] = "\n".join(captions) + "\n\n" + "\n".join(lines)
        else:
            caption = row.get("caption")
            lines = [caption] if isinstance(caption, str) else caption
            checked = fields.list_of(fields.any_text)(lines, f"{where}: caption")
            found[row["image"]] = "\n".join(checked)
    return found


def judging_requests(
    kind: Kind,
    questions: Sequence[BenchQuestion],
    contexts: Mapping[str, str],
    references: Sequence[str],
    answers: Sequence[str],
    *,
    model: str = judging.MODEL,
) -> list[judging.Request]:
    """A request for each question.

    Raises:
      DataError: an image has no context.
    """
    rule, found = _RULE.replace("{shown}", _SHOWN[kind]), []
    for one, reference, answer in zip(questions, references, answers, strict=True):
        if one.image not in contexts:
            raise DataError(f"question {one.id}: expected a context of {one.image!r}, found none.")
        parts = [("Context", contexts[one.image]), ("Question", one.text)]
        content = "".join(f"[{name}]\n{text}\n\n" for name, text in parts)
        for number, text in enumerate((reference, answer), 1):
            content += f"[{_ROLE} {number}]\n{text}\n\n[End of {_ROLE} {number}]\n\n"
        body = judging.chat(
            _SYSTEM,
            f"{content}[System]\n{rule}\n\n",
            model=model,
            temperature=0.2,
            max_tokens=1024,
        )
        found.append(judging.Request(id=one.id, body=body))
    return found


def parse_scores(reply: str) -> tuple[float, float]:
    """The two scores in the first line of a reply; (-1, -1), which counts in means, if that line is
    anything but two numbers with one space or comma between them."""
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, parts)
    except ValueError:
        return -1.0, -1.0
    return first, second


def summary(questions: Sequence[BenchQuestion], replies: Sequence[str]) -> dict[str, float]:
    """Relative score of each category and of "all": the model's mean as percent of the references'.

    As in the authors' script the means are rounded to three decimals and the result to one. NaN if
    the references' mean is 0.
    """
    pairs: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)
    for one, reply in zip(questions, replies, strict=True):
        for name in (one.category, "all"):
            pairs[name].append(parse_scores(reply))
    found = {}
    for name, scores in sorted(pairs.items()):
        reference, model = (round(mean, 3) for mean in np.mean(scores, axis=0).tolist())
        found[name] = round(model / reference * 100, 1) if reference else float("nan")
    return found
