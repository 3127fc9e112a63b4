"""The predictions file: round trip, refusal of damaged files, atomic writing."""

from __future__ import annotations

import errno
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.errors import DataError
from perception_jax.evals.predictions import (
    Prediction,
    align,
    prompt_hash,
    read_predictions,
    write_predictions,
)

FULL = Prediction(
    id="a/1",
    prompt="Wo ist der Apfel?\n",
    output="links – “hier”\u2028",
    model_id="scenes-clip",
    boxes=((0.5, 1.0, 20.25, 30.0), (0.0, 0.0, 0.0, 0.0)),
    scores=(0.75, 0.5),
    labels=("apple", "pear"),
    extras={"rank": 3},
)
PLAIN = Prediction(id="b", prompt="", output="", model_id="m", scores=(0.1, 0.2, 0.7))


def write_line(path, **changes):
    values = {"id": "x", "prompt": "p", "output": "o", "model_id": "m", "boxes": [], "scores": []}
    values |= {"prompt_hash": prompt_hash("p")} | changes
    values = {key: value for key, value in values.items() if value is not ...}
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")
    return path


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    assert write_predictions(path, iter([FULL, PLAIN])) == 2
    assert read_predictions(path) == [FULL, PLAIN]
    assert os.listdir(path.parent) == ["predictions.jsonl"]
    first = json.loads(path.read_text(encoding="utf-8").split("\n")[0])
    assert first["prompt_hash"] == FULL.prompt_hash
    assert list(first)[:5] == ["id", "prompt", "output", "boxes", "scores"]


@settings(deadline=None, max_examples=40)
@given(st.text(min_size=1), st.text(), st.text())
def test_any_text_survives(tmp_path_factory, name, prompt, output):
    path = tmp_path_factory.mktemp("p") / "p.jsonl"
    prediction = Prediction(id=name, prompt=prompt, output=output, model_id="m")
    write_predictions(path, [prediction])
    assert read_predictions(path) == [prediction]


def test_a_cut_file_names_its_last_line(tmp_path):
    path = tmp_path / "p.jsonl"
    write_predictions(path, [FULL, PLAIN])
    data = path.read_bytes()
    second = data.index(b"\n") + 1
    for end in (second + 1, second + 40, len(data) - 2):
        path.write_bytes(data[:end])
        with pytest.raises(DataError, match=r"last line, found it cut off in .*line 2"):
            read_predictions(path)
    # Only the last newline is gone: nothing is lost.
    path.write_bytes(data[:-1])
    assert len(read_predictions(path)) == 2


def test_a_damaged_line_names_its_number(tmp_path):
    path = tmp_path / "p.jsonl"
    write_predictions(path, [FULL, PLAIN])
    path.write_bytes(path.read_bytes().replace(b"{", b"", 1))
    with pytest.raises(DataError, match=r"one JSON object a line, .*line 1"):
        read_predictions(path)
    path.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match=r"utf-8.*line 1"):
        read_predictions(path)
    path.write_bytes(b"\n \n[1]\n")
    with pytest.raises(DataError, match=r"JSON object, found list in .*line 3"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": ...}, "the key 'output'.*line 1"),
        ({"output": 3}, "a string, found 3 in .*line 1, key 'output'"),
        ({"id": ""}, "non-empty string, .*key 'id'"),
        ({"scors": []}, "known keys, found 'scors' .*did you mean 'scores'"),
        ({"boxes": [[0, 0, 1]]}, r"four finite numbers .*key 'boxes\[0\]'"),
        ({"boxes": [[0, 0, 1, 1], [5, 0, 1, 1]]}, r"x1 <= x2.*key 'boxes\[1\]'"),
        ({"boxes": [[0, 0, 1, True]]}, r"four finite numbers .*key 'boxes\[0\]'"),
        ({"scores": ["0.5"]}, r"a finite number, found '0.5' .*key 'scores\[0\]'"),
        ({"scores": [float("nan")]}, "NaN, which JSON does not have"),
        ({"boxes": [[0, 0, 1, 1]], "scores": [1, 2]}, r"as many scores as boxes \(1\), found 2"),
        ({"labels": ["a"]}, r"as many labels as boxes \(0\), found 1"),
        ({"labels": [1]}, r"a string, found 1 .*key 'labels\[0\]'"),
        ({"extras": []}, r"an object, found \[\].*key 'extras'"),
        ({"prompt": "changed"}, "the prompt was changed"),
    ],
)
def test_wrong_values_name_line_and_key(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_predictions(write_line(tmp_path / "p.jsonl", **changes))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_predictions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="found an empty file"):
        read_predictions(tmp_path / "empty.jsonl")


def test_repeated_ids_are_refused_on_both_sides(tmp_path):
    path = tmp_path / "p.jsonl"
    with pytest.raises(DataError, match="found 'b' as number 1 and 2"):
        write_predictions(path, [PLAIN, PLAIN])
    assert os.listdir(tmp_path) == []
    write_predictions(path, [PLAIN])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DataError, match="found 'b' as number 1 and 2"):
        read_predictions(path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    write_predictions(path, [PLAIN])

    def broken():
        yield FULL
        raise RuntimeError("model died")

    with pytest.raises(RuntimeError, match="model died"):
        write_predictions(path, broken())
    with pytest.raises(DataError, match="at least one prediction to write"):
        write_predictions(path, [])
    with pytest.raises(DataError, match="JSON values in extras"):
        write_predictions(path, [Prediction(**BASE, extras={"x": float("inf")})])
    with pytest.raises(DataError, match="x1 <= x2"):
        write_predictions(path, [Prediction(**BASE, boxes=((2.0, 0.0, 1.0, 1.0),))])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_predictions(path, [FULL])
    assert os.listdir(tmp_path) == ["p.jsonl"]
    assert read_predictions(path) == [PLAIN]


BASE = {"id": "x", "prompt": "", "output": "", "model_id": "m"}


def test_align_orders_and_names_what_is_missing():
    assert align([FULL, PLAIN], ["b", "a/1"]) == [PLAIN, FULL]
    with pytest.raises(DataError, match=r"1 without one \(first: \['c'\]\) and 1 predictions"):
        align([FULL, PLAIN], ["b", "c"])
