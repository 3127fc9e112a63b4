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
from perception_jax.data.scenes import chats
from perception_jax.data.scenes.chats import ChatConfig, PairQuestions
from perception_jax.errors import DataError
from perception_jax.systems.mof import training
from perception_jax.systems.mof.records import conversations
from perception_jax.systems.text import TextModel

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
        assert 0 < page.rfind(title) < page.rfind("Run settings")


def test_towers_ran_once(workdir, monkeypatch):
    (folder,) = (path for path in (workdir / "kept").iterdir() if path.is_dir())
    first, second = (KeptFeatures(folder / f"tower-{k}") for k in (1, 2))
    assert first.shape == second.shape == (36, 160)
    assert (first.made["layer"], second.made["layer"]) == (3, 4)
    # Nor are scenes drawn again: the kept conversations are those of the scenes.
    (path,) = (workdir / "kept").glob("conversations-*.jsonl")
    words = [CONFIG, "--config.data.scenes=16", "--workdir=x"]
    plain = common.parse(words, train.PROGRAM).config
    kept = common.parse([*words, f"--config.data.keep={workdir / 'kept'}"], train.PROGRAM).config
    drawn, read = conversations(plain), conversations(kept)
    assert len(drawn) == len(read) == 16
    for k in range(16):
        assert read[k].id == drawn[k].id
        assert read[k].conversation == drawn[k].conversation
        assert len(read[k].images) == len(drawn[k].images)
    before = path.stat().st_mtime_ns
    kept.data.draw = 7
    assert conversations(kept)[0].conversation != drawn[0].conversation
    assert path.stat().st_mtime_ns == before
    # A version that asks otherwise about the same scenes does not take the file of this one.
    kept.data.draw = plain.data.draw
    monkeypatch.setattr(chats, "CAPTIONS", ("<image>\nSay it.", "<image>\nSay more."))
    read = [record.conversation for record in conversations(kept)]
    assert read == [record.conversation for record in conversations(plain)]
    assert any("Say" in turns[0].text for turns in read)
    assert path.stat().st_mtime_ns == before
    # Scenes of the same names that look different are not those whose features were kept.
    words = [*words, f"--config.data.keep={workdir / 'kept'}", "--config.data.chats.objects=1"]
    with pytest.raises(DataError, match="the images have changed since"):
        training.task(common.parse(words, train.PROGRAM).config)


def test_the_result_answers_by_its_own_vocabulary(workdir, tmp_path, capsys):
    loaded = perception_jax.load(workdir / "llava")
    text = "How many foxes are there in the picture? (a) 1 (b) 2"
    tokenizer = loaded.processor.tokenizer
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert loaded.config.image_size == 72
    record = PairQuestions(ChatConfig(canvas=72).scenes(), seed=0, per_pattern=1)[0]
    # It is asked as it was trained.
    config = common.parse([CONFIG, "--workdir=x"], train.PROGRAM).config
    transform = training._transform(config, loaded, [record], test=True)
    row = transform.row(transform.encode(record), 200)
    asked = record.conversation[0].text.removeprefix("<image>\n")
    prompt = TextModel(loaded).prompt_ids(asked, images=1)
    assert prompt == row["ids"][: len(prompt)].tolist()
    assert np.flatnonzero(row["label"] >= 0)[0] == len(prompt)
    PIL.Image.fromarray(np.asarray(record.image)).save(tmp_path / "scene.png")
    words = ["vqa", f"--model={workdir / 'llava'}", f"--image={tmp_path / 'scene.png'}"]
    words += [f"--question={text}", "--tokens=4", f"--out={tmp_path / 'out'}"]
    assert common.main(predict.PROGRAM, predict.run, words) == 0
    assert text in (tmp_path / "out" / "scene.json").read_text()
