"""Scores the answers of a multimodal model from files, and asks a model for them.

`run_mmvp` asks; the other functions read files, write the requests to a judge, and score.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from perception_jax.data.sources import fields
from perception_jax.errors import ConfigError, DataError
from perception_jax.evals import runner
from perception_jax.evals.predictions import read_predictions
from perception_jax.evals.vqa import asking, judging, llava_bench, lmms_eval, mmvp, pope, textvqa
from perception_jax.files import write_whole
from perception_jax.systems.mmvp import published
from perception_jax.systems.mmvp.tables import beside, pattern_table

REQUESTS_FILE, ANSWERS_FILE = "requests.jsonl", "answers.jsonl"
"""Names of the requests to a judge and of MMVP's answers."""
MM_VET_FILE = "mm-vet.json"
"""Name of the answers for MM-Vet's scorer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """What a protocol says of answers.

    Attributes:
      numbers: the main numbers by name, fractions; LLaVA-Bench's are its own percent.
      text: for the terminal.
    """

    numbers: Mapping[str, Any]
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtocolFiles:
    """What a protocol reads.

    Attributes:
      data: the benchmark's folder.
      answers: the model's answers, a folder of predictions or a file.
      replies: of a judge, if there are any.
      patterns: the pattern of each pair of MMVP.
      corrected: whether MMVP's corrected labels are used.
      out: folder of the results.
    """

    data: pathlib.Path
    answers: pathlib.Path
    out: pathlib.Path
    replies: pathlib.Path | None = None
    patterns: pathlib.Path | None = None
    corrected: bool = False


def run_mmvp(
    answers: asking.Answers,
    root: pathlib.Path,
    out: pathlib.Path,
    *,
    model: str,
    settings: asking.Decoding = mmvp.GREEDY,
) -> pathlib.Path:
    """Asks a model the questions of MMVP; a run that was stopped goes on.

    Args:
      answers: answers questions as `settings` say.
      root: folder of the benchmark.
      out: `out/predictions` grows while the model is asked.

    Returns:
      The answers file `out/answers.jsonl`, in the form of the authors'.

    Raises:
      DataError: the benchmark or an image cannot be read, or `out` has answers of another model or
        with other settings.
    """
    questions = mmvp.read_questions(root)
    found = asking.ask(
        mmvp.to_ask(root, questions), answers, out / "predictions", model=model, settings=settings
    )
    return asking.write_lines(out / ANSWERS_FILE, mmvp.answer_rows(questions, found, model=model))


def score_mmvp(files: ProtocolFiles) -> Scored:
    """Grades by rule, or by a judge's replies, and writes the requests to a judge.

    Of a folder of predictions the authors' answers file is written too.
    """
    questions = mmvp.read_questions(files.data, corrected=files.corrected)
    if files.answers.is_dir():
        found = runner.predicted([str(one.number) for one in questions], files.answers)
        model = found[0].model_id.partition("#")[0]
        rows = mmvp.answer_rows(questions, found, model=model)
        asking.write_lines(files.out / ANSWERS_FILE, rows)
    else:
        rows = mmvp.with_labels(mmvp.read_answers(files.answers), questions)
    requests = mmvp.grading_requests(rows)
    judging.write_requests(files.out / REQUESTS_FILE, requests)
    if files.replies is None:
        graded, by = [mmvp.grade_by_rule(row) for row in rows], "rule"
    else:
        replies = judging.read_replies(files.replies, [one.id for one in requests])
        graded, by = [mmvp.grade_of_reply(reply) == "yes" for reply in replies], "judge"
    scores = mmvp.pair_scores(graded)
    numbers = {**scores.to_dict(), "graded_by": by, "corrected": files.corrected}
    name = str(rows[0].get("model_id", files.answers.stem))
    text = [beside(name, 100 * scores.pair_accuracy, "MMVP", published.MMVP_ALL)]
    if by == "judge":
        text.append(scores.printed())
    if files.patterns is not None:
        patterns = mmvp.read_patterns(files.patterns, len(scores.pairs))
        numbers["patterns"] = mmvp.by_pattern(scores, patterns)
        text.append(pattern_table(numbers["patterns"]))
    return Scored(numbers=numbers, text="\n\n".join(text))


def score_pope(files: ProtocolFiles) -> Scored:
    """Scores each split that the answers are of, and the means.

    Ids of answers are "random/1", or those of LLaVA's questions file if `files.data` has it.
    """
    answers, llava = _texts(files.answers), files.data / "llava_pope_test.jsonl"
    others = pope.read_llava_ids(llava) if llava.is_file() else {}
    numbers, text = {}, []
    for questions in _pope_splits(files.data):
        ids, split = [one.id for one in questions], questions[0].id.partition("/")[0]
        if not any(name in answers for name in ids) and len(others.get(split, ())) == len(ids):
            ids = list(others[split])
        if not any(name in answers for name in ids):
            continue
        missing = [name for name in ids if name not in answers]
        if missing:
            raise DataError(f"{files.answers}: expected an answer to {missing[0]}, found none.")
        found = pope.score([answers[name] for name in ids], [one.label for one in questions])
        numbers[split] = found.to_dict()
        text.append(f"Category: {split}, # samples: {len(ids)}\n{found.printed()}")
    if not numbers:
        raise DataError(
            f"{files.answers}: expected answers with ids as random/1 to the files coco_pope_*.json "
            f"in {files.data}, found {sorted(answers)[:3]}."
        )
    splits = list(numbers.values())
    for name in ("f1", "accuracy"):
        numbers[f"mean_{name}"] = sum(one[name] for one in splits) / len(splits)
    text += [
        beside(f"mean {name}", 100 * numbers[f"mean_{name}"], "POPE", published.POPE)
        for name in ("f1", "accuracy")
    ]
    return Scored(numbers=numbers, text="\n".join(text))


def score_textvqa(files: ProtocolFiles) -> Scored:
    """Soft accuracy of predictions, or of LLaVA's answers file."""
    questions = textvqa.read_questions(files.data / _TEXTVQA[0])
    if files.answers.is_dir():
        found = runner.predicted([one.id for one in questions], files.answers)
        accuracy, count = textvqa.score(questions, [one.output for one in found]), len(found)
    else:
        accuracy, count = textvqa.score_llava_file(questions, files.answers)
    text = f"Samples: {count}\nAccuracy: {100 * accuracy:.2f}%"
    return Scored(numbers={"accuracy": accuracy, "questions": count}, text=text)


def score_llava_bench(kind: llava_bench.Kind, files: ProtocolFiles) -> Scored:
    """Writes the requests to a judge, and with its replies gives the relative scores.

    `files.data` has `questions.jsonl`, `context.jsonl` and `answers_gpt4.jsonl`, or the names of
    the COCO set.
    """
    names = _BENCH[kind]
    for name in names:
        if not (files.data / name).is_file():
            raise DataError(f"{files.data}: expected {', '.join(names)} in it, found no {name}.")
    questions = llava_bench.read_questions(files.data / names[0])
    if files.answers.is_dir():
        found = runner.predicted([one.id for one in questions], files.answers)
        answers = [one.output for one in found]
    else:
        answers = llava_bench.read_answers(files.answers, questions)
    requests = llava_bench.judging_requests(
        kind,
        questions,
        llava_bench.read_contexts(files.data / names[1], kind),
        llava_bench.read_answers(files.data / names[2], questions),
        answers,
    )
    path = judging.write_requests(files.out / REQUESTS_FILE, requests)
    if files.replies is None:
        text = f"{path}: {len(requests)} requests to a judge; score with --replies=FILE"
        return Scored(numbers={"requests": len(requests)}, text=text)
    replies = judging.read_replies(files.replies, [one.id for one in requests])
    found = llava_bench.summary(questions, replies)
    text = "\n".join(f"{name} {found[name]}" for name in found)
    if kind == "coco":
        table = beside("this run", found["all"], "LLaVA-Bench", published.LLAVA_BENCH)
        text = f"{text}\n\n{table}"
    return Scored(numbers=found, text=text)


_TEXTVQA = ("TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json")
_BENCH = {
    "coco": ("qa90_questions.jsonl", "caps_boxes_coco2014_val_80.jsonl", "qa90_gpt4_answer.jsonl"),
    "in_the_wild": ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl"),
}


def score(protocol: str, files: ProtocolFiles) -> Scored:
    """Scores answers by a protocol of the command `vqa_score`.

    Raises:
      ConfigError: a file that the protocol has no use for.
      DataError: a file that cannot be read, or is damaged.
    """
    given: Sequence[tuple[str, Any]] = (
        ("patterns", files.patterns),
        ("corrected", files.corrected),
    )
    unused = [name for name, value in given if value and protocol != "mmvp"]
    if files.replies is not None and protocol in ("pope", "textvqa"):
        unused.append("replies")
    if unused:
        raise ConfigError(f"--{unused[0]} is of no use for {protocol}.")
    if protocol.startswith("llava_bench_"):
        return score_llava_bench(protocol.removeprefix("llava_bench_"), files)
    return {"mmvp": score_mmvp, "pope": score_pope, "textvqa": score_textvqa}[protocol](files)


# --- Questions -----------------------------------------------------------------------------------


def questions_of(
    protocol: str, data: pathlib.Path, images: pathlib.Path | None, *, ocr: bool = False
) -> tuple[list[asking.BenchmarkQuestion], Mapping[str, asking.Decoding]]:
    """The questions of a benchmark, and how they are asked, by the name of the way.

    Args:
      images: folder of the images, where `data` does not hold them (all but mmvp).
      ocr: textvqa: whether prompts hold the words of the OCR file in `data`.

    Raises:
      ConfigError: a folder of images that is missing or of no use, or `ocr` for another benchmark.
      DataError: a file that cannot be read, or is damaged.
    """
    if (images is None) != (protocol == "mmvp"):
        raise ConfigError(
            f"--images is {'required' if images is None else 'of no use'} for {protocol}."
        )
    if ocr and protocol != "textvqa":
        raise ConfigError(f"--ocr is of no use for {protocol}.")
    if protocol == "mmvp":
        ways = {"greedy": mmvp.GREEDY, "as the authors' script": mmvp.REFERENCE}
        return mmvp.to_ask(data, mmvp.read_questions(data)), ways
    if protocol == "pope":
        asked = [one for split in _pope_splits(data) for one in pope.to_ask(split, images)]
        return asked, {"greedy": pope.GREEDY}
    if protocol == "textvqa":
        tokens = textvqa.read_ocr_tokens(data / _TEXTVQA[1]) if ocr else None
        questions = textvqa.read_questions(data / _TEXTVQA[0])
        return textvqa.to_ask(questions, images, tokens), {"greedy": textvqa.GREEDY}
    names = _BENCH[protocol.removeprefix("llava_bench_")]
    questions = llava_bench.read_questions(data / names[0])
    return llava_bench.to_ask(questions, images), {"greedy": llava_bench.GREEDY}


def write_questions(
    path: pathlib.Path, questions: Sequence[asking.BenchmarkQuestion]
) -> pathlib.Path:
    """Writes the questions for `launch.predict vqa`: `id`, `image` (from the file's folder) and
    `question`."""
    rows = (
        {"id": one.id, "image": os.path.relpath(one.image, path.parent), "question": one.prompt}
        for one in questions
    )
    return asking.write_lines(path, rows)


# --- Benchmarks that are scored elsewhere --------------------------------------------------------


def export_samples(
    benchmark: str,
    files: ProtocolFiles,
    *,
    identity: str,
    target: str,
    time: str,
) -> list[pathlib.Path]:
    """Writes predictions as lmms-eval's samples file, and for MM-Vet also as its scorer's file.

    Args:
      benchmark: of `evals.vqa.lmms_eval.TASKS`.
      files: `data` has the benchmark's rows in its order as JSON lines, `answers` is a folder of
        predictions.
      identity, target: names of the field that predictions are named after, and of the right
        answer.
      time: of the run, part of the file's name.

    Returns:
      The files.

    Raises:
      DataError: a file that cannot be read, a field or a prediction that is missing.
    """
    rows = asking.read_lines(files.data, **{identity: fields.identity})
    for number, row in enumerate(rows, 1):
        if target not in row:
            raise DataError(
                f"{files.data}: expected the right answer of row {number} in a field {target!r}, "
                f"found {', '.join(sorted(row))}."
            )
    found = runner.predicted([str(row[identity]) for row in rows], files.answers)
    lines = lmms_eval.samples(found, rows, [row[target] for row in rows])
    written = [lmms_eval.write_samples(files.out, benchmark, lines, time=time)]
    if benchmark == "mm_vet":
        written.append(files.out / MM_VET_FILE)
        write_whole(written[-1], json.dumps(lmms_eval.mm_vet_answers(found), indent=2))
    return written


def _pope_splits(data: pathlib.Path) -> list[tuple[pope.PopeQuestion, ...]]:
    """The questions of each split whose file is there.

    Raises:
      DataError: none is.
    """
    found = [s for s in pope.SPLITS if (data / f"coco_pope_{s}.json").is_file()]
    if not found:
        raise DataError(f"{data}: expected coco_pope_random.json or another split, found none.")
    return [pope.read_questions(data, split) for split in found]


def _texts(path: pathlib.Path) -> dict[str, str]:
    """Answers by id, from a folder of predictions or a file with `question_id` and `text`."""
    if path.is_dir():
        return {one.id: one.output for one in read_predictions(path)}
    rows = asking.read_lines(path, "text", question_id=fields.identity)
    return {str(row["question_id"]): row["text"] for row in rows}
