"""Results file, report sections and the export check that all systems share."""

from __future__ import annotations

import html
import json

import numpy as np
import pytest

from perception_jax.errors import CheckpointError, PerceptionError
from perception_jax.interop.verify import export_verified
from perception_jax.train.results import write_results
from perception_jax.viz import Report, sections

HISTORY = [
    {"step": 10, "loss": 2.0},
    {"step": 20, "loss": 1.5, "auc": None},
    {"step": 20, "auc": 0.6},
    {"step": 40, "loss": 1.0, "auc": 0.8},
]


def test_results_hold_numbers_and_details_and_print_the_numbers_alone(tmp_path, capsys):
    (tmp_path / "results.json").write_text("older")
    write_results(tmp_path, {"top1": 0.25, "longer/name": 3.0}, details={"scores": {"a": [1]}})
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == {"top1": 0.25, "longer/name": 3.0, "scores": {"a": [1]}}
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["  top1        0.25", "  longer/name 3"]
    assert lines[2:] == [f"results     {tmp_path / 'results.json'}"]


def test_results_that_cannot_be_written_are_one_clear_error(tmp_path):
    with pytest.raises(PerceptionError, match=r"expected to write the results to .*missing"):
        write_results(tmp_path / "missing", {"top1": 0.25})


def test_curves_have_the_logged_points_of_each_value():
    found = sections.curves(HISTORY, {"loss": "training loss", "auc": "AUC", "other": "other"})
    assert found.keys() == {"training loss", "AUC"}
    steps, values = found["AUC"]
    assert (steps.tolist(), values.tolist()) == ([20, 40], [0.6, 0.8])
    assert sections.curves(HISTORY, {"auc": "AUC"}, least=3) == {}


def test_the_subtitle_names_the_training_if_there_was_one():
    text = sections.subtitle(HISTORY, rows=96, measured_on="new images")
    assert text == "40 steps of 96 rows. Everything below is measured on new images."
    assert sections.subtitle([], rows=96, measured_on="x") == "Everything below is measured on x."


def test_shared_sections_appear_only_with_content():
    image = np.zeros((4, 4, 3), np.uint8)
    report = Report("A title")
    sections.add_learning_curves(report, [None, ""])
    sections.add_examples(report, "Examples", "Drawn at random.", [[], []], width=100)
    sections.add_run_settings(report, {"seed": 3}, rows=[("seed", "0")], note="One run.")
    text = html.unescape(report.html())
    assert "Learning curves" not in text
    assert "Examples" not in text
    assert text.index("<h2>Run settings</h2>") < text.index("One run.") < text.index('"seed": 3')
    sections.add_learning_curves(report, [None, "<b>chart</b>"], "An introduction.")
    sections.add_examples(report, "Examples", "", [[], [(image, "one", "ok")]], width=100)
    text = report.html().partition("<main>")[2]
    assert text.index("An introduction.") < text.index("<b>chart</b>") < text.index("Examples")
    assert text.count("<img ") == 1


def export(folder, value):
    (folder / "weights").write_text(str(value))


def outputs(folder):
    return {"embeddings": np.array([float((folder / "weights").read_text())])}


def test_an_export_replaces_the_folder_if_its_outputs_are_those_of_the_model(tmp_path):
    target = tmp_path / "hf"
    for value in (1.0, 2.0):
        expected = {"embeddings": np.array([value + 5e-6])}
        export_verified(target, lambda folder, v=value: export(folder, v), outputs, expected)
    assert outputs(target)["embeddings"] == 2.0


@pytest.mark.parametrize(
    ("expected", "said"),
    [
        ({"embeddings": np.array([1.1])}, "same embeddings .* found a difference of 0.1"),
        ({"embeddings": np.array([np.nan])}, "found a difference of nan"),
        ({"logits": np.array([1.0])}, r"expected the outputs \['logits'\]"),
    ],
)
def test_an_export_with_other_outputs_leaves_the_folder_as_it_was(tmp_path, expected, said):
    target = tmp_path / "hf"
    target.mkdir()
    export(target, 7.0)
    with pytest.raises(CheckpointError, match=said):
        export_verified(target, lambda folder: export(folder, 1.0), outputs, expected)
    assert outputs(target)["embeddings"] == 7.0
    assert [item.name for item in tmp_path.iterdir()] == ["hf"]
