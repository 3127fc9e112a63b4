"""The small LLaVA on scenes: trained on kept features, tested beside floors, and asked."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest

import perception_jax
from launch import common, predict, train
from perception_jax.data.kept_features import KeptFeatures
from perception_jax.data.records import MMVP_PATTERNS
from perception_jax.data.scenes.chats import ChatConfig, PairQuestions

CONFIG = "--config=configs/mof/scenes.py:mix=imof,runlocal"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mof_scenes")
    words = [
        *(CONFIG, f"--workdir={folder}", f"--config.data.keep={folder / 'kept'}"),
        *("--config.train.steps=2", "--config.data.scenes=16", "--config.evaluation.pairs=1"),
        *("--config.evaluation.questions=4", "--config.evaluation.scenes=4"),
    ]
    assert common.main(train.PROGRAM, train.run, words) == 0
    return folder


def test_results_stand_beside_floors(workdir):
    found = json.loads((workdir / "results.json").read_text())
    for floor in ("", "blank image/", "question only/"):
        assert {f"pairs/{floor}{name}" for name in ("accuracy", *MMVP_PATTERNS)} <= set(found)
        assert f"questions/{floor}accuracy" in found
    assert 0.25 <= found["questions/most frequent answer/accuracy"] <= 1
    page = (workdir / "report.html").read_text()
    for title in ("Minimal pairs", "Questions", "blank image", "most frequent answer"):
        assert title in page


def test_towers_ran_once(workdir):
    (folder,) = (workdir / "kept").iterdir()
    first, second = (KeptFeatures(folder / f"tower-{k}") for k in (1, 2))
    assert first.shape == second.shape == (36, 160)
    assert (first.made["layer"], second.made["layer"]) == (3, 4)


def test_the_result_answers_by_its_own_vocabulary(workdir, tmp_path, capsys):
    loaded = perception_jax.load(workdir / "llava")
    text = "How many foxes are there in the picture? (a) 1 (b) 2"
    tokenizer = loaded.processor.tokenizer
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert loaded.config.image_size == 72
    record = PairQuestions(ChatConfig(canvas=72).scenes(), seed=0, per_pattern=1)[0]
    PIL.Image.fromarray(np.asarray(record.image)).save(tmp_path / "scene.png")
    words = ["vqa", f"--model={workdir / 'llava'}", f"--image={tmp_path / 'scene.png'}"]
    words += [f"--question={text}", "--tokens=4", f"--out={tmp_path / 'out'}"]
    assert common.main(predict.PROGRAM, predict.run, words) == 0
    assert text in (tmp_path / "out" / "scene.json").read_text()
