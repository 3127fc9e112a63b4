"""`launch.predict vqa_export`: answers for benchmarks that are scored elsewhere."""

from __future__ import annotations

import json
import pathlib

from launch import common, predict
from perception_jax.evals.vqa import asking, lmms_eval
from perception_jax.systems.mmvp import program


def run(*words):
    return common.main(predict.PROGRAM, predict.run, list(map(str, words)))


def test_answers_are_exported_for_scorers_elsewhere(tmp_path, capsys):
    rows = [
        {"question_id": 7, "image": "7.png", "question": "What?", "answer": "a cat"},
        {"question_id": 3, "image": "3.png", "question": "Where?", "answer": "here"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [
        asking.BenchmarkQuestion(id=name, image=data, prompt=f"question {name}")
        for name in ("3", "7")
    ]
    answers = asking.one_by_one(lambda image, prompt: f"to {prompt}")
    asking.ask(questions, answers, tmp_path / "answers", model="m")
    words = (
        "vqa_export",
        f"--data={data}",
        f"--answers={tmp_path}/answers",
        f"--out={tmp_path}/out",
    )
    assert run(*words, "--benchmark=mm_vet") == 0
    samples, mm_vet = capsys.readouterr().out.split()
    found = [json.loads(line) for line in pathlib.Path(samples).read_text().splitlines()]
    assert [row["doc"]["question_id"] for row in found] == [7, 3]
    assert [row["filtered_resps"] for row in found] == [["to question 7"], ["to question 3"]]
    assert [row["target"] for row in found] == ["a cat", "here"]
    assert json.loads(pathlib.Path(mm_vet).read_text()) == {
        "v1_7": "to question 7",
        "v1_3": "to question 3",
    }
    for wrong, message in (
        ("--target=label", "right answer of row 1 in a field 'label', found answer, image"),
        ("--id=number", "number"),
    ):
        assert run(*words, "--benchmark=gqa", wrong) == 1
        assert message in capsys.readouterr().err


def test_the_benchmarks_to_export_are_those_of_lmms_eval():
    assert tuple(lmms_eval.TASKS) == program._EXPORTED
