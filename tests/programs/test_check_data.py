"""`launch.check_data` on a user's own images: what it draws, what it names, what it refuses."""

from __future__ import annotations

import html
import json
import re
import types

import numpy as np
import PIL.Image
import pytest

from launch import check_data, common, data_page, systems
from perception_jax.api import Loaded
from perception_jax.data import images
from perception_jax.data.loader import RecordExamples
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.sources import open_source
from perception_jax.data.tokenization import ClipTokenizer


class Records:
    """Training data of which `check_data` knows the records and the transform alone."""

    tokenizer = ClipTokenizer.shipped(600, 24)

    def __init__(self, path: str):
        self.path = path

    def examples(self, seed):
        return RecordExamples(open_source(self.path), self.transform, seed)

    def transform(self, record, rng):
        processed = ImageProcessor(size=20)(images.decode(record.image, name=record.id))
        boxes = np.zeros((3, 4), np.float32)
        found = np.array([one.box for one in record.objects])
        boxes[: len(found)] = processed.geometry.clip(processed.geometry.boxes(found))
        tokens = self.tokenizer(record.captions)
        arrays = {"image": processed.pixels, "boxes": boxes, "ids": tokens.ids[0]}
        return arrays | {"box_mask": np.arange(3) < len(found)}


@pytest.fixture
def data(tmp_path):
    """Two records of a green square on black; the second one's file is broken."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:30, 20:40] = (0, 255, 0)
    PIL.Image.fromarray(image).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no")
    lines = [
        {
            "image": name,
            "id": name,
            "caption": "a <green> thing",
            "objects": [{"name": "square", "box": [20, 10, 40, 30]}],
            "referring": [{"text": "the only one", "target": 0}],
            "instructions": [{"text": "find the dog", "target": None}],
        }
        for name in ("good.png", "bad.png")
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path


@pytest.fixture
def run(data, monkeypatch):
    """Runs the program on the two records, as the data of a system of their own."""
    program = types.SimpleNamespace(data=lambda config: Records(config.data.source))
    monkeypatch.setattr(systems, "training_program", lambda config: program)
    config = ["--config=configs/clip/scenes.py", f"--config.data.source={data / 'data.jsonl'}"]

    def run(*words: str) -> int:
        argv = [*config, f"--out={data / 'page.html'}", *words]
        return common.main(check_data.PROGRAM, check_data.run, argv)

    return run


def test_the_page(data, run, capsys):
    assert run() == 0
    printed = capsys.readouterr().out
    assert "1 of 2 records usable" in printed
    assert "bad.png" in printed
    page = html.unescape((data / "page.html").read_text())
    for text in (
        "2 records",
        "“a < green > thing”",  # decoded from the ids
        "0: square at 20, 10, 40, 30",
        "the only one → 0 (square)",
        "find the dog → absent",
        "not an image of a supported format",
        "record, 60×40",
        "image, 20×20",
    ):
        assert text in page
    assert len(re.findall(r"<img ", page)) == 2


def test_boxes_are_drawn_where_the_model_has_them():
    """20×20 pixels enlarged 16 times: an outline around the middle, none for the padding."""
    image = np.zeros((20, 20, 3), np.uint8)
    boxes = np.array([[5.0, 5, 15, 15], [0, 0, 20, 20]], np.float32)
    example = {"image": image, "boxes": boxes, "box_mask": np.array([True, False])}
    [(drawn, caption)] = data_page._draw_example(example)
    assert caption == "image, 20×20"
    assert drawn.shape == (320, 320, 3)
    coloured = np.argwhere(drawn[:, 200:240].any((-1, -2))).ravel()
    assert (coloured.min(), coloured.max()) == (80, 239)


def test_nothing_usable(data, run, capsys):
    (data / "good.png").unlink()
    assert run() == 1
    assert "0 of 2 records usable" in capsys.readouterr().out
    assert run("--count=0") == 1
    assert "--count" in capsys.readouterr().err


def test_the_data_of_a_config_need_no_weights(tmp_path, monkeypatch):
    """Boxes of GiVE's own data are among what is drawn."""
    monkeypatch.setattr(Loaded, "read", lambda *_, **__: pytest.fail("weights were read"))
    words = ["--config=configs/give/scenes.py:runlocal", "--count=1", f"--out={tmp_path}/page.html"]
    assert common.main(check_data.PROGRAM, check_data.run, words) == 0
    page = html.unescape((tmp_path / "page.html").read_text())
    assert "image, 72×72" in page
    # Its planned batches have millions of rows, made of that many records.
    [count] = re.findall(r"([\d,]+) records", page)
    assert 0 < int(count.replace(",", "")) < 10_000
