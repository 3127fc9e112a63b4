"""GiVE from training to report and folder, through the programs themselves."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import PIL.Image
import pytest

import perception_jax
from launch import common, evaluate, train
from perception_jax.errors import CheckpointError
from perception_jax.systems.give import program
from perception_jax.systems.give.pretrained import GiveEncoder
from perception_jax.systems.give.report import pictures
from perception_jax.train.metrics import read_metrics

CONFIG = "--config=configs/give/scenes.py:runlocal"
SMALL = [
    "--config.train.steps=4",
    "--config.train.log_every=1",
    "--config.train.evaluate_every=2",
    "--config.data.length=60",
]


def run(workdir):
    return common.main(train.PROGRAM, train.run, [CONFIG, *SMALL, f"--workdir={workdir}"])


@pytest.fixture(scope="module", autouse=True)
def _two_scenes():
    """Fewer pictures than a report has otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "SCENES", 2)
        yield


@pytest.fixture(scope="module")
def unreported(tmp_path_factory):
    """A run that ended between its last evaluation and its report."""
    workdir = tmp_path_factory.mktemp("give")

    def full(*_):
        raise CheckpointError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "save", full)
        assert run(workdir) == 1
    return workdir


@pytest.fixture(scope="module")
def workdir(unreported):
    """Of a finished run, with what an earlier one left in the folder that it writes."""
    (unreported / "hf").mkdir()
    (unreported / "hf" / "old").touch()
    before = (unreported / "metrics.jsonl").read_text()
    assert run(unreported) == 0
    assert (unreported / "metrics.jsonl").read_text() == before  # nothing was trained again
    return unreported


def test_a_run_without_its_report_has_trained_and_evaluated(unreported):
    steps = [(row["step"], "loss" in row) for row in read_metrics(unreported)]
    assert steps == [(1, True), (2, True), (2, False), (3, True), (4, True), (4, False)]
    assert not (unreported / "results.json").exists()


def test_training_leaves_results_that_are_those_of_its_last_evaluation(workdir):
    results = json.loads((workdir / "results.json").read_text())
    last = read_metrics(workdir)[-1]
    logged = {k.removeprefix("evaluate/"): v for k, v in last.items() if "/" in k}
    assert len(logged) > 15
    assert {key: results[key] for key in logged} == pytest.approx(logged, abs=1e-5)
    scores = results["scores"]
    assert scores["diagnostics"]["oid_auc"]["all"] == pytest.approx(results["unseen/oid_auc_all"])
    assert set(scores["p_protocol"]) == {"conditioned", "static", "copy_floor"}


def test_the_report_has_curves_maps_and_what_the_settings_were(workdir):
    page = html.unescape((workdir / "report.html").read_text())
    sections = re.findall("<h2>(.*?)</h2>", page)
    assert sections == [
        "Effect of the instruction",
        "Maps with and without the instruction",
        "Overlooked objects: found and missed",
        "Learning curves",
        "Does the model use the image or copy the instruction?",
        "All numbers",
        "Run settings",
    ]
    assert "has not left it by step 4" in page
    for curve in ("OID loss: is the object present?", "equal lines mean copying", "copy floor"):
        assert curve in page
    assert page.count("<img ") > 2 * 6  # of two scenes at least six each
    assert "60 scenes of four artists, each of 2 to 3 objects out of 20" in page
    assert '"learning_rate": 0.003' in page
    assert "n/a (unconfirmed)" in page


def test_the_folder_holds_backbone_and_adapters_of_the_run(workdir):
    assert not (workdir / "hf" / "old").exists()
    image = np.random.default_rng(0).integers(0, 256, (60, 48, 3), np.uint8)
    told = ["the kite"]
    whole = GiveEncoder.from_pretrained(workdir / "hf")
    apart = GiveEncoder.from_pretrained(workdir / "give.safetensors")
    assert apart.backbone.name == "scenes-clip"
    found, expected = (one.encode([image], told) for one in (whole, apart))
    np.testing.assert_allclose(found.embedding, expected.embedding, atol=1e-5)
    np.testing.assert_allclose(found.presence_logit, expected.presence_logit, atol=1e-5)
    plain = perception_jax.load("scenes-clip")
    static = plain.model.vision(plain.processor.images([image])).embedding[0]
    assert abs(found.embedding[0] - static / np.linalg.norm(static)).max() > 1e-4


def test_a_folder_that_gives_something_else_is_refused(workdir, tmp_path, monkeypatch):
    """What is there stays."""
    encoder = GiveEncoder.from_pretrained(workdir / "hf")
    other = GiveEncoder.from_pretrained(workdir / "hf")
    other.model.oid_head.fc2.bias[...] += 1e-3
    monkeypatch.setattr(GiveEncoder, "from_pretrained", lambda folder: other)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "old").touch()
    with pytest.raises(
        CheckpointError, match=r"same presence logits .* found a difference of 0\.001"
    ):
        program.save(encoder.model, encoder.backbone, tmp_path)
    assert [item.name for item in (tmp_path / "hf").iterdir()] == ["old"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["give.safetensors", "hf"]


@pytest.mark.parametrize("of", [".", "give.safetensors"])
def test_evaluate_gives_the_numbers_of_the_run(workdir, tmp_path, of, monkeypatch):
    """The page of the run has pictures, compiled anew; that of the file need not show them too."""
    if of != ".":
        monkeypatch.setattr(pictures, "Pictures", lambda *args: None)
    arguments = [CONFIG, *SMALL, f"--checkpoint={workdir / of}", f"--out={tmp_path}"]
    assert common.main(evaluate.PROGRAM, evaluate.run, arguments) == 0
    found, expected = (
        json.loads((folder / "results.json").read_text()) for folder in (tmp_path, workdir)
    )
    assert found.pop("scores").keys() == expected.pop("scores").keys()
    assert found == pytest.approx(expected, abs=1e-5)
    page = (tmp_path / "report.html").read_text()
    assert "Learning curves" not in page
    assert (page.count("<img ") > 2 * 6) == (of == ".")


def test_a_backbone_alone_is_no_give(tmp_path, capsys):
    arguments = [CONFIG, "--checkpoint=scenes-clip", f"--out={tmp_path}"]
    assert common.main(evaluate.PROGRAM, evaluate.run, arguments) == 1
    assert "scenes-clip: no adapters there" in capsys.readouterr().err


def test_the_quickstart_on_images_without_objects_says_what_it_needs(tmp_path, capsys):
    for k in range(10):
        PIL.Image.new("RGB", (40, 40)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text("a photo")
    arguments = ["--config=configs/quickstart.py:short", f"--config.data.source={tmp_path}"]
    assert common.main(train.PROGRAM, train.run, [*arguments, f"--workdir={tmp_path}/run"]) == 1
    assert "objects that have a class and a caption" in capsys.readouterr().err


@pytest.mark.slow  # a second training; its losses and heads have unit tests
def test_the_plus_profile_trains_from_end_to_end(tmp_path):
    arguments = [f"{CONFIG},plus", "--config.train.steps=2", "--config.train.log_every=1"]
    assert common.main(train.PROGRAM, train.run, [*arguments, f"--workdir={tmp_path}"]) == 0
    first, last = (row for row in read_metrics(tmp_path) if "loss" in row)
    assert last["dense"] > 0
    # Fresh adapters change nothing, so nothing moves away from the static embedding yet.
    assert first["generic"] == pytest.approx(0, abs=1e-6)
    assert last["generic"] > 2e-6
    total = 3 * last["oid"] + last["oitc"] + last["dense"] + last["generic"]
    assert last["loss"] == pytest.approx(total, rel=1e-3)
    encoder = GiveEncoder.from_pretrained(tmp_path)
    assert encoder.model.dense_head is not None
