"""POPE, LLaVA-Bench, TextVQA and lmms-eval's format: files, prompts, scores."""

from __future__ import annotations

import json
import math

import pytest

from perception_jax.errors import DataError
from perception_jax.evals.predictions import Prediction
from perception_jax.evals.vqa import llava_bench, lmms_eval, pope, textvqa


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- POPE ----------------------------------------------------------------------------------------


def test_pope_reads_its_files_and_asks_with_a_suffix(tmp_path):
    rows = [
        {"question_id": k, "image": f"{k}.jpg", "text": f"Is there a {k}?", "label": label}
        for k, label in enumerate(("yes", "no"), 1)
    ]
    write_lines(tmp_path / "coco_pope_random.json", rows)
    found = pope.read_questions(tmp_path, "random")
    assert [one.id for one in found] == ["random/1", "random/2"]
    (first, _) = pope.to_ask(found, tmp_path)
    assert first.prompt == "Is there a 1?\nAnswer the question using a single word or phrase."
    with pytest.raises(DataError, match="a split of random"):
        pope.read_questions(tmp_path, "rare")
    write_lines(tmp_path / "coco_pope_random.json", [*rows, rows[0]])
    with pytest.raises(DataError, match="question 1: expected one line"):
        pope.read_questions(tmp_path, "random")
    write_lines(tmp_path / "coco_pope_random.json", [{**rows[0], "label": "maybe"}])
    with pytest.raises(DataError, match="found 'maybe'"):
        pope.read_questions(tmp_path, "random")


def test_pope_without_a_positive_has_no_precision():
    found = pope.score(["no", "no"], ["no", "no"])
    assert math.isnan(found.precision)
    assert math.isnan(found.f1)
    assert found.accuracy == 1.0
    with pytest.raises(DataError, match="0 answers and 1 labels"):
        pope.score([], ["no"])


# --- LLaVA-Bench ---------------------------------------------------------------------------------

QUESTIONS = [
    {"question_id": k, "image": "a.jpg", "category": kind, "text": f"Question {k}?"}
    for k, kind in enumerate(("conv", "detail", "conv"))
]


def bench(tmp_path):
    return llava_bench.read_questions(write_lines(tmp_path / "questions.jsonl", QUESTIONS))


def test_the_judge_reads_captions_and_boxes(tmp_path):
    questions = bench(tmp_path)
    context = {
        "image": "a.jpg",
        "captions": ["One.", "Two."],
        "instances": [{"category": "dog", "bbox": [0.1, 0.2, 0.3, 0.4]}],
    }
    contexts = llava_bench.read_contexts(write_lines(tmp_path / "c.jsonl", [context]), "coco")
    requests = llava_bench.judging_requests("coco", questions, contexts, ["R"] * 3, ["A"] * 3)
    content = requests[0].body["messages"][1]["content"]
    start = (
        "[Context]\nOne.\nTwo.\n\ndog: [0.1, 0.2, 0.3, 0.4]\n\n[Question]\nQuestion 0?\n\n"
        "[Assistant 1]\nR\n\n[End of Assistant 1]\n\n[Assistant 2]\nA\n\n[End of Assistant 2]\n\n"
        "[System]\nWe would like to request your feedback on the performance of two AI assistants"
    )
    assert content.startswith(start)
    assert "bottom right y. \nPlease rate the helpfulness" in content
    assert content.endswith("does not affect your judgment.\n\n")
    assert requests[0].body["max_tokens"] == 1024
    with pytest.raises(DataError, match=r"question 0: expected a context of 'a.jpg'"):
        llava_bench.judging_requests("coco", questions, {}, ["R"] * 3, ["A"] * 3)


def test_in_the_wild_has_texts_instead_of_boxes(tmp_path):
    rows = [{"image": "a.jpg", "caption": "One."}, {"image": "b.jpg", "caption": ["x", "y"]}]
    contexts = llava_bench.read_contexts(write_lines(tmp_path / "c.jsonl", rows), "in_the_wild")
    assert contexts == {"a.jpg": "One.", "b.jpg": "x\ny"}
    questions = bench(tmp_path)
    requests = llava_bench.judging_requests(
        "in_the_wild", questions, contexts, ["R"] * 3, ["A"] * 3
    )
    content = requests[0].body["messages"][1]["content"]
    assert "represented with a few sentences describing the image. \nPlease rate" in content
    assert "bounding box" not in content


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 9\nBecause.", (8.0, 9.0)),
        ("8,9.5", (8.0, 9.5)),
        ("8, 9", (-1.0, -1.0)),  # two spaces
        ("8 9 ", (-1.0, -1.0)),
        ("eight nine", (-1.0, -1.0)),
        ("8", (-1.0, -1.0)),
        ("", (-1.0, -1.0)),
    ],
)
def test_scores_stand_in_the_first_line(reply, scores):
    assert llava_bench.parse_scores(reply) == scores


def test_relative_scores_keep_replies_without_scores(tmp_path):
    found = llava_bench.summary(bench(tmp_path), ["8 6\n", "5 5", "broken"])
    # conv: means 3.5 and 2.5; all: 4.0 and 3.333.
    assert found == {"all": 83.3, "conv": 71.4, "detail": 100.0}


def test_answers_are_found_by_id(tmp_path):
    questions = bench(tmp_path)
    rows = [{"question_id": k, "text": f"answer {k}"} for k in (2, 0, 1)]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    assert llava_bench.read_answers(path, questions) == ("answer 0", "answer 1", "answer 2")
    write_lines(path, rows[:2])
    with pytest.raises(DataError, match=r"none to \['1'\]"):
        llava_bench.read_answers(path, questions)


# --- TextVQA -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Dog", "dog"),
        ("Two dogs.", "2 dogs"),
        ("none", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("he's", "he 's"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("well-known", "well known"),
        ("a-b c- d", "ab c d"),
        ("\ttwo\nlines ", "2 lines"),
        ("what?", "what"),
    ],
)
def test_answers_are_normalised_as_by_the_server(answer, normal):
    assert textvqa.normalise(answer) == normal


def test_soft_scores_average_over_the_people_left_out():
    answers = ["red"] * 3 + ["Blue"] * 2 + ["green"] + ["the red."] + ["x", "y", "z"]
    scores = textvqa.soft_scores(answers)
    assert scores["red"] == pytest.approx(1.0)  # four: three others even for those who said it
    assert scores["blue"] == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert scores["green"] == pytest.approx(9 / 30)
    with pytest.raises(DataError, match="10 people, found 3"):
        textvqa.soft_scores(["x"] * 3)


def text_questions(tmp_path):
    rows = [
        {
            "question_id": k,
            "image_id": f"img{k % 2}",
            "question": f"what is WORD {k}?",
            "answers": ["stop"] * 10,
        }
        for k in range(3)
    ]
    path = tmp_path / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"data": rows}))
    return textvqa.read_questions(path)


def test_prompts_hold_the_words_of_the_image(tmp_path):
    questions = text_questions(tmp_path)
    path = tmp_path / "ocr.json"
    path.write_text(json.dumps({"data": [{"image_id": "img0", "ocr_tokens": ["STOP", "here"]}]}))
    tokens = textvqa.read_ocr_tokens(path)
    asked = textvqa.to_ask(questions, tmp_path, tokens)
    suffix = "\nAnswer the question using a single word or phrase."
    assert asked[0].prompt == f"What is word 0?\nReference OCR token: STOP, here{suffix}"
    assert asked[1].prompt == f"What is word 1?\nReference OCR token: {suffix}"
    assert textvqa.to_ask(questions, tmp_path)[0].prompt == f"What is word 0?{suffix}"
    assert asked[2].image == tmp_path / "img0.jpg"


def test_llavas_answers_file_is_scored_by_image_and_question(tmp_path):
    questions = text_questions(tmp_path)
    rows = [
        {"question_id": one.image, "prompt": asked.prompt, "text": text}
        for one, asked, text in zip(
            questions,
            textvqa.to_ask(questions, tmp_path, {}),
            ("Stop.", "go", "the stop"),
            strict=True,
        )
    ]
    path = write_lines(tmp_path / "answers.jsonl", rows)
    assert textvqa.score_llava_file(questions, path) == (pytest.approx(2 / 3), 3)
    write_lines(path, [{**rows[0], "prompt": "Reference OCR token: x\nwhat is word 0?\nAnswer"}])
    assert textvqa.score_llava_file(questions, path) == (1.0, 1)
    write_lines(path, [{**rows[0], "question_id": "img1"}])
    with pytest.raises(DataError, match="known questions"):
        textvqa.score_llava_file(questions, path)


# --- lmms-eval -----------------------------------------------------------------------------------


def test_answers_are_exported_in_the_format_of_lmms_eval(tmp_path):
    one = Prediction(id="4", prompt="Which?", output="B", model_id="m")
    docs = [{"question": "Which?", "image": "…", "image_id": 3, "answer": "B"}]
    lines = lmms_eval.samples([one], docs, ["B"])
    path = lmms_eval.write_samples(tmp_path, "mmbench", lines, time="20260101_10:00:00")
    assert path.name == "20260101_10-00-00_samples_mmbench_en_dev.jsonl"
    row = json.loads(path.read_text())
    assert row["doc"] == {"question": "Which?", "answer": "B"}
    assert (row["resps"], row["filtered_resps"], row["target"]) == ([["B"]], ["B"], "B")
    assert {len(row[f"{name}_hash"]) for name in ("doc", "prompt", "target")} == {64}
    assert lmms_eval.mm_vet_answers([one]) == {"v1_4": "B"}
    with pytest.raises(DataError, match="Did you mean mmbench"):
        lmms_eval.write_samples(tmp_path, "mmbensh", lines, time="now")
