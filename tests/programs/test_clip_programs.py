"""Train on one's own images, evaluate the run and its export, through the programs themselves."""

from __future__ import annotations

import json

import jax
import numpy as np
import PIL.Image
import pytest
from flax import nnx

import perception_jax
from launch import common, contact_sheet, evaluate, train
from perception_jax import api
from perception_jax.errors import ConfigError
from perception_jax.evals.predictions import PredictionWriter
from perception_jax.models.clip.config import ClipConfig
from perception_jax.models.params import flatten
from perception_jax.models.siglip.config import SiglipConfig
from perception_jax.systems.contrastive import program
from perception_jax.testing.tiny_clip import PROCESSOR

CONFIG = "--config=configs/clip/scenes.py:runlocal"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty captioned pictures, one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for k in range(40):
        colour = rng.integers(0, 256, 3)
        noise = rng.integers(0, 40, (50, 70, 3))
        pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"photo{k:02d}.jpg")
        (folder / f"photo{k:02d}.txt").write_text(f"a picture of colour number {k}")
    (folder / "photo03.jpg").write_bytes((folder / "photo03.jpg").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def workdir(photos, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    arguments = [CONFIG, f"--config.data.source={photos}", "--config.train.steps=3"]
    small = ["--config.train.batch_size=16", f"--workdir={workdir}"]
    assert common.main(train.PROGRAM, train.run, [*arguments, *small]) == 0
    return workdir


def test_training_on_own_images_reports_and_exports(workdir):
    results = json.loads((workdir / "results.json").read_text())
    assert set(results) == {
        f"retrieval/{way}_{kind}r{k}"
        for way in ("image_to_text", "text_to_image")
        for kind in ("", "chance_")
        for k in (1, 5, 10)
    }
    page = (workdir / "report.html").read_text()
    assert "your images" in page
    assert "a picture of colour number 9" in page  # every tenth record is held out
    assert perception_jax.load(workdir / "hf").config.vision.image_size == 48


@pytest.mark.parametrize("kind", ["run", "export"])
def test_evaluate_gives_the_numbers_of_the_run(workdir, photos, tmp_path, kind):
    checkpoint = workdir if kind == "run" else workdir / "hf"
    arguments = [CONFIG, f"--config.data.source={photos}", f"--checkpoint={checkpoint}"]
    assert common.main(evaluate.PROGRAM, evaluate.run, [*arguments, f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == pytest.approx(json.loads((workdir / "results.json").read_text()))


def test_a_stopped_evaluation_goes_on_and_gives_the_same_numbers(
    workdir, photos, tmp_path, monkeypatch, capsys
):
    arguments = [CONFIG, f"--config.data.source={photos}", f"--checkpoint={workdir}"]
    added = PredictionWriter.add

    def stopped(self, prediction):
        if len(self.done) == 2:
            raise KeyboardInterrupt
        added(self, prediction)

    parsed = common.parse([*arguments, f"--out={tmp_path}"], evaluate.PROGRAM)
    with monkeypatch.context() as patch:
        patch.setattr(PredictionWriter, "add", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(parsed)
    assert not (tmp_path / "results.json").exists()
    assert common.main(evaluate.PROGRAM, evaluate.run, [*arguments, f"--out={tmp_path}"]) == 0
    assert "(6 made, 2 of an earlier run)" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert found == json.loads((workdir / "results.json").read_text())
    assert not (workdir / "predictions").exists()


def test_evaluate_says_what_is_missing(tmp_path, capsys):
    arguments = [CONFIG, "--checkpoint=no-such-thing", f"--out={tmp_path}"]
    assert common.main(evaluate.PROGRAM, evaluate.run, arguments) == 1
    assert "no-such-thing" in capsys.readouterr().err


def test_contact_sheet_is_a_picture_of_the_asked_size(tmp_path):
    words = [f"--out={tmp_path}/sheet.png", "--rows=1", "--columns=2", "--canvas=64", "--boxes"]
    assert common.main(contact_sheet.PROGRAM, contact_sheet.run, words) == 0
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 2 * 64 + 3 * 12
        assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100


def test_a_published_model_is_named_by_its_hub_id(photos):
    config, _ = common.load_config("configs/clip/vit_b16.py")
    config.data.update({"source": str(photos), "workers": 0})
    config.train.batch_size = 4
    task = program.task(config)
    assert task.model == ClipConfig.vit_b16()
    batch = next(iter(task.datasets()["train"]))
    assert batch["image"].shape == (4, 224, 224, 3)
    (shapes,) = task.batch_shapes()
    assert {key: batch[key].shape for key in shapes} == {
        key: leaf.shape for key, leaf in shapes.items()
    }
    assert batch["ids"][0, 0] == 49406  # CLIP's own vocabulary


def test_a_siglip_fetches_its_vocabulary(photos, monkeypatch):
    config, _ = common.load_config("configs/siglip/so400m14_384.py")
    config.data.source = str(photos)
    fetched = []
    monkeypatch.setattr(api, "backbone_processor", lambda name: fetched.append(name) or PROCESSOR)
    task = program.task(config)
    assert (fetched, task.processor) == (["google/siglip-so400m-patch14-384"], PROCESSOR)
    assert (task.model, task.config.loss) == (SiglipConfig.so400m_384(), "sigmoid")
    model = nnx.eval_shape(lambda: task.init(jax.random.key(0)))
    assert model.logit_bias.shape == ()


def test_the_finer_recipe_trains_on_pairs_and_altered_captions():
    config, _ = common.load_config("configs/clip/scenes_fine.py:runlocal")
    config.data.length = 64
    task = program.task(config)
    records = [task.data.examples(0)[k][0] for k in range(16)]
    assert sum(record.id.startswith("pair-") for record in records) == 2
    batch = next(iter(task.datasets()["train"]))
    (shapes,) = program.shapes(config)[1]
    assert {key: batch[key].shape for key in shapes} == {
        key: leaf.shape for key, leaf in shapes.items()
    }
    assert batch["altered"].mean() > 0.5
    full, _ = common.load_config("configs/clip/scenes_fine.py")
    assert not full.data.augment.colour  # captions name colours
    # It starts from a CLIP with larger patches.
    full.data.length = 64
    task = program.task(full)
    model = nnx.eval_shape(lambda: task.init(jax.random.key(0)))
    found = task.pretrained(flatten(model))
    assert found.keys() == flatten(model).keys()
    shape = found["vision/patch_embed/kernel"].shape
    assert shape == (8, 8, 3, full.model.width)
    full.model.text_depth = 3
    with pytest.raises(ConfigError, match=r"scenes-clip has text\.depth = 2, not 3\. Give"):
        program.task(full)
