"""Self-supervised training and evaluation through the programs themselves."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import perception_jax
from configs.selfsup import scenes
from launch import common, evaluate, train
from perception_jax.data.records import MMVP_PATTERNS
from perception_jax.errors import ConfigError
from perception_jax.systems.selfsup import program

CONFIG = "--config=configs/selfsup/scenes.py:runlocal"
SMALL = (
    *("--config.data.length=16", "--config.evaluation.names=6", "--config.evaluation.learned=30"),
    *("--config.evaluation.tested=20", "--config.model.image_size=48"),
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    steps = ["--config.train.steps=2", "--config.train.batch_size=8"]
    arguments = [CONFIG, *SMALL, *steps, f"--workdir={workdir}"]
    assert common.main(train.PROGRAM, train.run, arguments) == 0
    return workdir


def test_training_reports_beside_floors_and_another_tower_and_exports(workdir):
    results = json.loads((workdir / "results.json").read_text())
    names = {"concepts/top1", "concepts/top5"}
    names |= {f"probes/{name}" for name in ("direction", "side", "height", "colour")}
    names |= {f"pairs/{name}" for name in ("accuracy", *MMVP_PATTERNS)}
    kinds = ("", "floor/", "untrained/", "beside/")
    assert set(results) == {f"{kind}{name}" for kind in kinds for name in names}
    page = (workdir / "report.html").read_text()
    assert "scenes-clip" in page
    exported = json.loads((workdir / "hf" / "config.json").read_text())
    assert exported["model_type"] == "dinov2"
    loaded = perception_jax.load(workdir / "hf")
    assert (loaded.config.image_size, loaded.config.patch_size) == (48, 12)
    clip = perception_jax.load("scenes-clip")
    pixels = loaded.processor.images([np.zeros((48, 48, 3), np.uint8)])
    grids = [one.patch_embed.grid(pixels) for one in (loaded.model, clip.model.vision)]
    assert grids == [(4, 4), (4, 4)]


def test_pairs_of_own_images_are_refused(tmp_path):
    config = scenes.get_config("runlocal")
    config.data.source = str(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.alike='pairs': minimal pairs are drawn"):
        program.data(config)
    config.data.alike = "twins"
    config.data.source = program.SCENES
    for use in (program.data, program.shapes):
        with pytest.raises(ConfigError, match="one of none, mirror, pairs, found 'twins'"):
            use(config)
    config.data.update({"alike": "mirror", "patterns": ("text",)})
    with pytest.raises(ConfigError, match="patterns: of no use for alike='mirror'"):
        program.data(config)


@pytest.mark.parametrize("kind", ["run", "export"])
def test_evaluate_gives_the_numbers_of_the_run(workdir, tmp_path, kind):
    checkpoint = workdir if kind == "run" else workdir / "hf"
    arguments = [CONFIG, *SMALL, f"--checkpoint={checkpoint}", f"--out={tmp_path}"]
    assert common.main(evaluate.PROGRAM, evaluate.run, arguments) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == pytest.approx(json.loads((workdir / "results.json").read_text()), abs=1e-6)


def test_a_start_with_another_normalisation_is_refused(workdir, tmp_path):
    folder = shutil.copytree(workdir / "hf", tmp_path / "hf")
    config = common.parse([CONFIG, *SMALL, "--workdir=x"], train.PROGRAM).config
    config.start = str(folder)
    program.task(config)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["image_std"] = [0.5, 0.5, 0.5]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"config\.start: expected .* found .*0\.5, 0\.5, 0\.5"):
        program.task(config)
