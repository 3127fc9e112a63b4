"""Hostile values in every field of every JSON that is read for data: `DataError` or sound records.

Each field of a sound file is replaced by each of a list of values, or left out; nothing but a
`DataError` may come out, and what is read must pickle, compare and be text that can be written.
"""

from __future__ import annotations

import copy
import json
import pathlib
import pickle
from collections.abc import Iterator
from typing import Any

import PIL.Image
import pytest

from launch import common, import_moinst
from perception_jax.data.moinst import captions, lvis, tables
from perception_jax.data.moinst.boxes import SourceBoxes
from perception_jax.data.moinst.published import import_published
from perception_jax.data.moinst.record import read_classes, write_images
from perception_jax.data.sources import fields, open_source
from perception_jax.errors import DataError

DEEP: Any = "deep"
for _ in range(200):
    DEEP = [DEEP, {"k": DEEP}] if _ < 3 else [DEEP]

HOSTILE = (
    *(None, True, False, 0, -1, 7.5, 2**63, -(2**63), 10**400, 1e308),
    *(float("nan"), float("inf"), "", " ", "\ud800", "a\0b", "x" * 5000, "../../x"),
    *([], {}, [None], [1, 2, 3, 4], [[1], [2]], {"a": {"b": []}}, DEEP),
)
GONE = object()
EVERY = 4
"""Each field meets every fourth of the values, the next field the ones after them."""

COCO = {
    "images": [
        {
            "id": 1,
            "file_name": "a.png",
            "coco_url": "http://x/train2017/a.png",
            "width": 8,
            "height": 6,
            "caption": "x",
            "captions": ["y"],
            "neg_category_ids": [2],
            "not_exhaustive_category_ids": [1],
        },
        {"id": 2, "file_name": "b.png", "coco_url": "http://x/y/b.png", "width": 8, "height": 6},
    ],
    "annotations": [
        {
            "id": 11,
            "image_id": 1,
            "category_id": 1,
            "bbox": [1, 1, 2, 3],
            "area": 4.5,
            "iscrowd": 0,
            "caption": "z",
        },
        {"id": 12, "image_id": 2, "category_id": 2, "bbox": [0, 0, 2, 3]},
        {"id": 13, "image_id": 2, "caption": "w", "category_id": 1, "bbox": [0, 0, 8, 6]},
    ],
    "categories": [
        {"id": 1, "name": "Dog", "image_count": 3, "frequency": "f", "synonyms": ["hound"]},
        {"id": 2, "name": "cat", "image_count": 2},
    ],
}
LINE = {
    "image": "a.png",
    "id": "first",
    "width": 8,
    "height": 6,
    "captions": ["two dogs"],
    "objects": [
        {
            "name": "dog",
            "box": [0, 0, 4.5, 6],
            "caption": "a dog",
            "attributes": {"colour": "red"},
            "category_id": 1,
            "object_id": 7,
            "area": 20.5,
            "crowd": False,
        }
    ],
    "referring": [{"text": "it", "target": 0}],
    "questions": [{"text": "How many?", "answer": "2", "options": ["1", "2"], "kind": "count"}],
    "instructions": [{"text": "Find it.", "target": 0}],
    "absent": ["cat"],
    "extras": {"source": {"name": "mine"}},
}
OBJECT = {"image": "a.png", "class": "Q", "caption": "q", "box": [0, 0, 1, 1], "instruction": "x"}
MOINST = {
    "image_id": 5,
    "file": "a.png",
    "width": 8,
    "height": 6,
    "objects": [
        {
            "class": "dog",
            "class_id": 0,
            "source_category_id": 18,
            "object_id": 7,
            "captions": ["a dog"],
            "instruction": None,
            "bbox": [1, 2, 3, 4],
            "salient": True,
        }
    ],
    "neg_class_ids": [],
    "nonexhaustive_class_ids": [0],
}
CHATS = [
    {
        "id": 7,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A dog."},
        ],
    },
    {"id": "x", "image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "Hi"}]},
]
ROWS = {
    "rows": [
        {
            "image_id": 1,
            "file_name": "a.png",
            "image_path": "x/a.png",
            "category_id": 18,
            "object_id": 7,
            "captions": ["a dog"],
            "instruction": "dog?",
        }
    ],
    "categories": [{"id": 18, "name": "dog", "synonyms": ["hound"]}],
    "images": [{"id": 1, "width": 8, "height": 6}],
}
CLASSES = [
    {
        "class_id": 0,
        "source_category_id": 18,
        "class": "dog",
        "frequency": "f",
        "synonyms": ["hound"],
    }
]
ANSWER = {"image_id": 5, "object_id": 7, "caption": "a dog", "cosine": 0.3}


def every_record(path: pathlib.Path, **options) -> list:
    source = open_source(path, **options)
    found = [source[k] for k in range(len(source))]
    assert found == [pickle.loads(pickle.dumps(source))[k] for k in range(len(source))]
    return found


def read_coco(path):
    return every_record(path, kind="coco", outside="clip")


def read_coco_captions(path):
    sound = path.with_name("sound.json")
    sound.write_text(json.dumps(COCO))
    return every_record(sound, kind="coco", captions=path)


def read_jsonl(path):
    return every_record(path, kind="jsonl", outside="clip")


def read_objects(path):
    return every_record(path, kind="objects")


def read_moinst(path):
    return every_record(path, kind="moinst", outside="clip")


def read_llava(path):
    return every_record(path, kind="llava")


def read_published(path):
    imported = import_published(path, images=path.parent)
    write_images(path.with_name("out.jsonl"), imported.images["train"])
    return every_record(path.with_name("out.jsonl"), kind="moinst")


def read_foreign(path):
    imported = import_published(path, categories="coco80")
    write_images(path.with_name("out.jsonl"), imported.images["train"])
    return imported.images


def read_boxes(path):
    from perception_jax.data.moinst.record import from_json

    return SourceBoxes(path).fill([from_json({**MOINST, "width": None}, "x")])


def read_lvis(path):
    config = lvis.RebuildConfig(classes=2, images=2, min_side=0.0)
    built = lvis.rebuild(fields.read_json(path), config)
    write_images(path.with_name("out.jsonl"), built.images)
    return list(captions.questions(built.images))


def read_excluded(path):
    return import_moinst._image_ids([str(path)])


READERS = {
    read_coco: COCO,
    read_coco_captions: {"images": [], "annotations": [{"image_id": 1, "caption": "x"}]},
    read_jsonl: LINE,
    read_objects: OBJECT,
    read_moinst: MOINST,
    read_llava: CHATS,
    read_published: ROWS,
    read_foreign: ROWS,
    read_boxes: {
        "images": [{"id": 5, "width": 8, "height": 6}],
        "annotations": [{"id": 7, "image_id": 5, "category_id": 18, "bbox": [1, 1, 2, 3]}],
    },
    read_lvis: {
        **COCO,
        "annotations": [*COCO["annotations"], {**COCO["annotations"][1], "id": 14, "image_id": 1}],
    },
    read_excluded: {"images": [{"id": 1}, {"id": "x"}]},
    tables.read_categories: ROWS["categories"],
    read_classes: CLASSES,
    captions.read_answers: ANSWER,
}


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in inner:
        yield (*path, key)
        if isinstance(one, dict | list):
            yield from places(one, (*path, key))


def replaced(content: Any, path: tuple, value: Any) -> Any:
    changed = copy.deepcopy(content)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_hostile_values(tmp_path, read):
    for name in ("a.png", "b.png", "train2017/a.png", "y/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.Image.new("RGB", (8, 6)).save(tmp_path / name)
    path, content = tmp_path / "x.json", READERS[read]
    path.write_text(json.dumps(content))
    assert read(path)
    refused = longest = 0
    for number, place in enumerate(places(content)):
        for value in (GONE, *HOSTILE[number % EVERY :: EVERY]):
            path.write_text(json.dumps(replaced(content, place, value)))
            try:
                repr(read(path)).encode()
            except DataError as error:
                refused += 1
                longest = max(longest, len(str(error).encode()))
            except Exception as error:
                raise AssertionError(f"{place} = {value!r:.80}: {error!r:.300}") from None
    assert refused
    assert longest < 1500


def test_hostile_keys_are_named_in_short(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({**LINE, "x" * 10**6: 1}))
    with pytest.raises(DataError, match="unknown key 'xxx") as caught:
        read_jsonl(path)
    assert len(str(caught.value)) < 1000
    path.write_text(json.dumps({f"key {k}": 1 for k in range(10_000)}))
    for read in (read_coco, read_lvis, read_published):
        with pytest.raises(DataError, match="key 0") as caught:
            read(path)
        assert len(str(caught.value)) < 1500


def test_the_program_prints_odd_samples(tmp_path, capsys):
    rows = [{**ROWS["rows"][0], "note": "\ud800"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    words = [
        "published",
        f"--train={tmp_path}/x.json",
        f"--out={tmp_path}/out",
        "--categories=coco80",
    ]
    assert common.main(import_moinst.PROGRAM, import_moinst.run, words) == 0
    assert "\\ud800" in capsys.readouterr().out
