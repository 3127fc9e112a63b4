"""Predictions on disk: round trip, going on after a crash, refusal of damaged files."""

from __future__ import annotations

import errno
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.errors import DataError
from perception_jax.evals import runner
from perception_jax.evals.predictions import (
    Detections,
    Prediction,
    PredictionWriter,
    align,
    prompt_hash,
    read_predictions,
    text_of,
    vector_of,
)

LINES = "predictions-00000-of-00001.jsonl"
ROWS = "detections-00000-of-00001.bin"


def boxes(*rows: tuple[float, ...], score: float = 0.5, label: int = 1) -> Detections:
    return Detections(
        boxes=np.array(rows, np.float32).reshape(-1, 4),
        scores=np.full(len(rows), score, np.float32),
        labels=np.full(len(rows), label, np.int32),
    )


FULL = Prediction(
    id="a/1",
    prompt="Wo ist der Apfel?\n",
    output="links – “hier”\u2028",
    model_id="m",
    detections=boxes((0.5, 1.0, 20.25, 30.0), (0.0, 0.0, 0.0, 0.0)),
    extras={"rank": 3},
)
PLAIN = Prediction(id="b", output="", model_id="m")
LAST = Prediction(id="c", output="", model_id="m", detections=boxes((1.0, 2.0, 3.0, 4.0)))


def plain(one: Prediction) -> dict:
    """What two predictions are compared by."""
    values = {name: getattr(one, name) for name in ("id", "prompt", "output", "model_id")}
    found = one.detections
    rows = found and {name: getattr(found, name).tolist() for name in ("boxes", "scores", "labels")}
    return {**values, "extras": dict(one.extras), "detections": rows}


def write(folder, *predictions: Prediction) -> None:
    with PredictionWriter(folder) as writer:
        for one in predictions:
            writer.add(one)


def test_round_trip(tmp_path):
    write(tmp_path / "new", FULL, PLAIN)
    write(tmp_path / "new", LAST)
    found = read_predictions(tmp_path / "new")
    assert [plain(one) for one in found] == [plain(one) for one in (FULL, PLAIN, LAST)]
    assert sorted(os.listdir(tmp_path / "new")) == [ROWS, LINES]
    first = json.loads((tmp_path / "new" / LINES).read_text(encoding="utf-8").split("\n")[0])
    assert first["prompt_hash"] == prompt_hash(FULL.prompt)
    assert first["detections"] == [0, 2]


@settings(deadline=None, max_examples=40)
@given(st.text().filter(str.strip), st.text(), st.text())
def test_any_text_survives(tmp_path_factory, name, prompt, output):
    folder = tmp_path_factory.mktemp("p")
    one = Prediction(id=name, prompt=prompt, output=output, model_id="m")
    write(folder, one)
    assert plain(read_predictions(folder)[0]) == plain(one)


@pytest.mark.parametrize("cut", [1, 40, 90])
def test_what_a_crash_cut_off_is_dropped_and_predicted_again(tmp_path, cut, caplog):
    write(tmp_path, FULL, PLAIN, LAST)
    data = (tmp_path / LINES).read_bytes()
    (tmp_path / LINES).write_bytes(data[:-cut])
    assert [one.id for one in read_predictions(tmp_path)] == ["a/1", "b"]
    with PredictionWriter(tmp_path) as writer:
        assert writer.done == {"a/1", "b"}
        writer.add(LAST)
    assert "cut off" in caplog.text
    assert (tmp_path / LINES).read_bytes() == data
    assert plain(read_predictions(tmp_path)[-1]) == plain(LAST)


def test_lines_whose_rows_were_lost_are_dropped(tmp_path):
    """The system may have written the lines before the rows."""
    write(tmp_path, FULL, PLAIN, LAST)
    rows = (tmp_path / ROWS).read_bytes()
    (tmp_path / ROWS).write_bytes(rows[:-1])
    assert [one.id for one in read_predictions(tmp_path)] == ["a/1", "b"]
    with PredictionWriter(tmp_path) as writer:
        assert writer.done == {"a/1", "b"}
        writer.add(LAST)
    assert (tmp_path / ROWS).read_bytes() == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": ...}, "line 1: expected the key 'output'"),
        ({"output": 3}, "line 1: output: expected a text, found 3"),
        ({"id": ""}, "line 1: id: expected a text that is not blank"),
        ({"extra": {}}, "line 1: unknown key 'extra'.*extras"),
        ({"extras": []}, r"line 1: extras: expected an object"),
        ({"extras": {"x": float("nan")}}, "NaN, which JSON does not have"),
        ({"detections": [0, -1]}, r"\[first row, number of rows\], found \[0, -1\]"),
        ({"detections": [0, 1]}, "found none that are whole .*detections-"),
        ({"prompt": "changed"}, "the prompt was changed"),
    ],
)
def test_wrong_values_name_line_and_key(tmp_path, changes, message):
    values = {"id": "x", "prompt": "p", "output": "o", "model_id": "m"}
    values |= {"prompt_hash": prompt_hash("p")} | changes
    values = {key: value for key, value in values.items() if value is not ...}
    (tmp_path / LINES).write_text(json.dumps(values) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_predictions(tmp_path)


def test_damaged_lines_and_missing_files(tmp_path):
    for data, message in (
        (b"\xff\n", r"line 1: .*utf-8"),
        (b"\n \n[1]\n", r"line 3: expected an object"),
        (b"{\n", r"line 1: expected one JSON object a line"),
    ):
        (tmp_path / LINES).write_bytes(data)
        with pytest.raises(DataError, match=message):
            read_predictions(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        read_predictions(tmp_path / "none")
    (tmp_path / LINES).write_bytes(b"")
    with pytest.raises(DataError, match="found none"):
        read_predictions(tmp_path)


BASE = {"id": "x", "output": "", "model_id": "m"}
NAN = boxes((0.0, 0.0, 1.0, 1.0), score=float("nan"))
FEW = boxes((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 2.0, 2.0))
# As without the type checks of the tests.
object.__setattr__(FEW, "scores", FEW.scores[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extras": {"x": float("inf")}}, "JSON values in extras"),
        ({"detections": boxes((2.0, 0.0, 1.0, 1.0))}, "x1 <= x2"),
        ({"detections": NAN}, "finite boxes and scores"),
        ({"detections": FEW}, r"found \(2, 4\), 1 and 2"),
    ],
)
def test_what_is_malformed_is_not_written(tmp_path, changes, message):
    write(tmp_path, PLAIN)
    with pytest.raises(DataError, match=message):
        write(tmp_path, Prediction(**BASE, **changes))
    assert [one.id for one in read_predictions(tmp_path)] == ["b"]
    with pytest.raises(DataError, match="found 'b' a second time"):
        write(tmp_path, PLAIN)


def test_a_full_disk_is_one_error(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write(tmp_path, FULL)


def test_two_processes_cannot_write_the_same_predictions(tmp_path):
    with PredictionWriter(tmp_path) as writer:
        with pytest.raises(DataError, match="another process is writing"):
            PredictionWriter(tmp_path)
        writer.add(PLAIN)
    write(tmp_path, LAST)
    assert [one.id for one in read_predictions(tmp_path)] == ["b", "c"]


def test_align_orders_and_names_what_is_missing():
    assert align([FULL, PLAIN], ["b", "a/1"]) == [PLAIN, FULL]
    with pytest.raises(DataError, match=r"1 without one \(first: \['c'\]\) and 1 predictions"):
        align([FULL, PLAIN], ["b", "c"])


IDS = [f"image {k}" for k in range(7)]


def outputs(numbers, stop: int = 99):
    for k in numbers:
        if k == stop:
            raise RuntimeError("the model failed")
        yield Prediction(id=IDS[k], output=str(k * k), model_id="m", detections=boxes((0, 0, k, k)))


def test_a_run_goes_on_where_it_stopped_also_on_other_processes(tmp_path):
    with pytest.raises(RuntimeError, match="the model failed"):
        runner.predict(IDS, lambda left: outputs(left, stop=3), tmp_path, model_id="m")
    asked = []

    def run(numbers):
        asked.append(list(numbers))
        return outputs(numbers)

    made = [runner.predict(IDS, run, tmp_path, model_id="m", host=(k, 2)) for k in (0, 1)]
    assert asked == [[4, 6], [3, 5]]  # 0 to 2 were on disk
    assert made == [2, 2]
    assert runner.predict(IDS, run, tmp_path, model_id="m") == 0
    found = runner.predicted(IDS, tmp_path)
    assert [one.output for one in found] == [str(k * k) for k in range(7)]
    assert [float(one.detections.boxes[0, 2]) for one in found] == list(range(7))


def test_what_other_processes_left_cut_off_is_predicted_again(tmp_path):
    """Two processes were killed; one goes on with the work of both."""
    for k in (0, 1):
        runner.predict(IDS, outputs, tmp_path, model_id="m", host=(k, 2))
        lines = tmp_path / f"predictions-0000{k}-of-00002.jsonl"
        lines.write_bytes(lines.read_bytes()[:-7])
    assert runner.predict(IDS, outputs, tmp_path, model_id="m") == 2
    assert [one.output for one in runner.predicted(IDS, tmp_path)] == [str(k * k) for k in range(7)]


def test_a_vector_is_kept_bit_by_bit():
    vector = np.array([0.1, -3e-39, np.inf, np.pi], np.float32)
    assert vector_of(text_of(vector)).tobytes() == vector.tobytes()
    with pytest.raises(DataError, match="Base64 of float32 numbers, found 'AAA='"):
        vector_of("AAA=")


def test_predictions_of_other_weights_or_examples_are_refused(tmp_path):
    runner.predict(IDS, outputs, tmp_path, model_id="m")
    with pytest.raises(DataError, match=r"predictions of 'm', expected .* by 'n'"):
        runner.predict(IDS, outputs, tmp_path, model_id="n")
    with pytest.raises(DataError, match=r"of other examples \('image 6'\)"):
        runner.predict(IDS[:6], outputs, tmp_path, model_id="m")
    with pytest.raises(DataError, match="prediction of 'image 0' by 'm', found that of 'image 1'"):
        runner.predict(IDS, lambda left: outputs(left[1:]), tmp_path / "two", model_id="m")
    with pytest.raises(DataError, match="expected 7 predictions, found 0"):
        runner.predict(IDS, lambda left: (), tmp_path / "three", model_id="m")
    with pytest.raises(DataError, match="distinct ids"):
        runner.predict(["a", "a"], outputs, tmp_path / "four", model_id="m")
