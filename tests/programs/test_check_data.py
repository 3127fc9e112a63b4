"""`launch.check_data` on a user's own images: what it draws, what it names, what it refuses."""

from __future__ import annotations

import html
import itertools
import json
import re
import textwrap

import numpy as np
import PIL.Image
import pytest

from launch import check_data, common, data_page

NUMBERS = itertools.count()
CONFIG = """
import dataclasses

import ml_collections
import numpy as np

from perception_jax.data import images
from perception_jax.data.loader import RecordExamples
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.sources import open_source
from perception_jax.data.tokenization import ClipTokenizer


def get_config(arg=None):
    return ml_collections.ConfigDict({"source": SOURCE})


@dataclasses.dataclass
class Task:
    path: str
    tokenizer = ClipTokenizer.shipped(600, 24)

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


def get_task(config):
    return Task(config.source)
"""


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


def run(folder, config: str, *words: str) -> int:
    path = folder / f"check_data_config_{next(NUMBERS)}.py"  # a config file is imported once
    path.write_text(textwrap.dedent(config))
    argv = [f"--config={path}", f"--out={folder / 'page.html'}", *words]
    return common.main(check_data.PROGRAM, check_data.run, argv)


def test_the_page(data, capsys):
    config = CONFIG.replace("SOURCE", repr(str(data / "data.jsonl")))
    assert run(data, config) == 0
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
        "not an image of a format",
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


def test_nothing_usable_and_what_is_no_task(data, capsys):
    (data / "good.png").unlink()
    config = CONFIG.replace("SOURCE", repr(str(data / "data.jsonl")))
    assert run(data, config) == 1
    assert "0 of 2 records usable" in capsys.readouterr().out
    assert run(data, config, "--count=0") == 1
    assert "--count" in capsys.readouterr().err
    assert run(data, config.replace("def examples", "def records")) == 1
    assert "Task has no `examples`" in capsys.readouterr().err
    assert run(data, config.replace("def get_task", "def task")) == 1
    assert "expected get_task(config)" in capsys.readouterr().err
