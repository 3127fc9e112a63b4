"""Asks a multimodal model the questions of a benchmark; a run that was stopped goes on.

The model is any function of an image and a prompt (`Answer`), or of several questions at once
(`Answers`). `evals.runner` keeps what it gives; each protocol then writes its own answers file.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from perception_jax.data import text_lines
from perception_jax.data.records import Image
from perception_jax.data.sources import fields
from perception_jax.errors import DataError
from perception_jax.evals import runner
from perception_jax.evals.predictions import Prediction, prompt_hash
from perception_jax.files import write_whole


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BenchmarkQuestion:
    """A question about an image.

    Attributes:
      id: unique in its benchmark.
      image: see `data.records.Image`.
      prompt: the text after the image.
    """

    id: str
    image: Image
    prompt: str


Answer = Callable[[Image, str], str]
"""Answers a prompt about an image."""
Answers = Callable[[Sequence[BenchmarkQuestion]], Iterable[str]]
"""Answers questions, in their order. What is drawn for a question should depend on its id, not on
its place: a run that goes on asks only what is left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a benchmark wants its questions asked.

    Attributes:
      template: name of the conversation template (`data.conversation.TEMPLATES`).
      temperature: 0 is greedy.
      top_k, top_p: what is drawn from; None for all tokens.
      max_tokens: of an answer.
      image_mode: of `ImageProcessor`; None for the checkpoint's own.
    """

    template: str = "vicuna_v1"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int = 128
    image_mode: str | None = None


def one_by_one(answer: Answer) -> Answers:
    """Asks a function of an image and a prompt one question after the other."""
    return lambda questions: (answer(one.image, one.prompt) for one in questions)


def ask(
    questions: Sequence[BenchmarkQuestion],
    answers: Answers,
    folder: str | os.PathLike[str],
    *,
    model: str,
    settings: Mapping[str, Any] | Decoding | None = None,
    host: tuple[int, int] = (0, 1),
) -> list[Prediction]:
    """Asks what the folder has no answer to yet, and returns all answers.

    Args:
      folder: of the predictions file. It holds answers of one model, with equal settings, to the
        same prompts.
      model: its name.
      settings: what else answers depend on.
      host: index and number of the processes that share the questions; all of them write into
        `folder`, and this call fails if the others' answers are still missing.

    Raises:
      DataError: the folder holds other answers, or an image or an answer is missing.
    """
    model_id = run_id(questions, model=model, settings=settings)

    def run(left: Sequence[int]) -> Iterator[Prediction]:
        asked = [questions[k] for k in left]
        for one, text in zip(asked, answers(asked), strict=False):  # the runner counts them
            yield Prediction(id=one.id, prompt=one.prompt, output=text, model_id=model_id)

    ids = [one.id for one in questions]
    runner.predict(ids, run, folder, model_id=model_id, host=host)
    return runner.predicted(ids, folder)


def run_id(
    questions: Sequence[BenchmarkQuestion],
    *,
    model: str,
    settings: Mapping[str, Any] | Decoding | None = None,
) -> str:
    """The model's name with a digest of settings and prompts: "name#0123456789abcdef"."""
    plain = dataclasses.asdict(settings) if isinstance(settings, Decoding) else settings
    prompts = [(one.id, one.prompt) for one in questions]
    digest = hashlib.sha256(json.dumps([plain, prompts], sort_keys=True).encode())
    return f"{model}#{digest.hexdigest()[:16]}"


def answer_id(prediction: Prediction) -> str:
    """16 hexadecimal digits that name an answer, the same for the same answer."""
    return prompt_hash("\n".join((prediction.model_id, prediction.id, prediction.output)))


def write_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> pathlib.Path:
    """Writes JSON objects, one a line; the file is replaced atomically."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_lines(
    path: str | os.PathLike[str], *required: str, **checks: fields.Check
) -> list[dict[str, Any]]:
    """Reads a JSONL file of objects.

    Args:
      required: keys of every object whose values are texts.
      checks: further keys of every object.

    Raises:
      DataError: the file is empty; a line is no object, or lacks a key (file and line are named).
    """
    wanted = dict.fromkeys(required, fields.any_text) | checks

    def check(entry: Any, where: str) -> dict[str, Any]:
        return dict(fields.mapping(entry, where)) | dict(
            zip(wanted, fields.values(entry, where, **wanted), strict=True)
        )

    found = list(fields.json_lines(path, check))
    if not found:
        raise DataError(f"{path}: expected one JSON object a line, found none.")
    return found


def read_csv(path: str | os.PathLike[str], *columns: str) -> list[tuple[int, tuple[str, ...]]]:
    """Columns of a CSV file by name, with the number of each row's last line.

    Letter case and spaces around the names in the header do not matter, nor do further columns.

    Raises:
      DataError: the file cannot be read, a column is missing, or a row has too few or too many
        cells.
    """
    rows = csv.reader(io.StringIO(text_lines.read_text(path), newline=""), strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        missing = [name for name in columns if name.lower() not in header]
        if missing:
            raise DataError(
                f"{path}:1: expected the columns {', '.join(columns)}, found {', '.join(header)}."
            )
        places = [header.index(name.lower()) for name in columns]
        found = []
        for row in rows:
            if len(row) != len(header) and row:
                raise DataError(
                    f"{path}:{rows.line_num}: expected {len(header)} cells, found {len(row)}. "
                    "Quote cells that hold commas."
                )
            if row:
                found.append((rows.line_num, tuple(row[k] for k in places)))
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: not CSV ({error}).") from error
    if not found:
        raise DataError(f"{path}: expected rows below the header, found none.")
    return found


def find_folder(root: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """The first of these folders that exists in `root`.

    Raises:
      DataError: none does.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f"{root}: expected one of the folders {', '.join(map(repr, names))} in it.")
