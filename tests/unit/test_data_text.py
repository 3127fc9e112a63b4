"""Text files are read alike by every reader: marks, line ends, separators, encodings."""

from __future__ import annotations

import json
import os
import pathlib

import PIL.Image
import pytest

from perception_jax.data import text_lines
from perception_jax.data.moinst import captions
from perception_jax.data.moinst.source import MoinstSource
from perception_jax.data.sources import fields
from perception_jax.data.sources.folder import ImageFolder
from perception_jax.data.sources.jsonl import JsonlSource
from perception_jax.data.sources.objects import ObjectLines
from perception_jax.errors import DataError

SEPARATED = "menu\u2028OPEN\x85price\x0b\x0c\x1c end"


def read_jsonl(path: pathlib.Path) -> str:
    return JsonlSource(path)[0].captions[0]


def read_objects(path: pathlib.Path) -> str:
    return ObjectLines(path)[0].objects[0].caption


def read_moinst(path: pathlib.Path) -> str:
    return MoinstSource(path)[0].objects[0].caption


def read_answers(path: pathlib.Path) -> str:
    return captions.read_answers(path)[0].caption


def read_side_file(path: pathlib.Path) -> str:
    [text] = ImageFolder(path.parent)[0].captions
    return text


def read_list(path: pathlib.Path) -> str:
    [text] = text_lines.read_lines(path)
    return text


READERS = {
    read_jsonl: {"image": "a.png", "caption": SEPARATED},
    read_objects: {"image": "a.png", "class": "sign", "caption": SEPARATED},
    read_moinst: {
        "image_id": 1,
        "file": "a.png",
        "objects": [{"class": "sign", "class_id": 0, "captions": [SEPARATED]}],
    },
    read_answers: {"image_id": 1, "object_id": 2, "caption": SEPARATED},
    read_side_file: SEPARATED,
    read_list: SEPARATED,
}


@pytest.fixture
def folder(tmp_path):
    PIL.Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    return tmp_path


def line_of(content) -> str:
    if isinstance(content, str):
        return content
    return json.dumps(content, ensure_ascii=False)


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_line_ends_at_line_ends_alone_and_a_mark_is_no_text(folder, read):
    path, line = folder / "a.txt", line_of(READERS[read])
    for content in (
        line.encode(),
        b"\xef\xbb\xbf" + line.encode() + b"\r\n",
        b"\xef\xbb\xbf\r\n \r\n" + line.encode() + b"\r",
    ):
        path.write_bytes(content)
        assert read(path) == SEPARATED


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", r"a\.txt:2: expected UTF-8 text, found the byte 0xE9"),
        ("utf-16", r"a\.txt: expected UTF-8 text, found UTF-16"),
        ("utf-16-le", "a.txt: expected UTF-8 text, found NUL"),
    ],
)
def test_other_encodings_are_refused_by_name(folder, read, encoding, message):
    content = line_of(READERS[read]).replace("menu", "caf\xe9").replace("\u2028", "")
    (folder / "a.txt").write_bytes(f"\n{content}".encode(encoding))
    with pytest.raises(DataError, match=message):
        read(folder / "a.txt")


def test_lines_are_found_again_by_their_offset(tmp_path):
    path = tmp_path / "x"
    path.write_bytes("\ufeffone\r\r\ntwo\u2028\n\n\ufeffthr\xe9e\rfour".encode())
    indexed = text_lines.IndexedLines(path)
    found = list(indexed.scan())
    assert [(line.number, line.text) for line in found] == [
        (1, "one"),
        (3, "two\u2028"),
        (5, "thr\xe9e"),
        (6, "four"),
    ]
    assert [indexed[k] for k in range(len(indexed))] == found
    path.write_bytes(b"x" * (text_lines.MAX_LINE + 1))
    with pytest.raises(DataError, match="longer one at byte 0"):
        list(text_lines.lines(path))


def test_lists_can_come_through_a_pipe():
    reading, writing = os.pipe()
    os.write(writing, b"\xef\xbb\xbfone\r\ntwo")
    os.close(writing)
    assert text_lines.read_lines(pathlib.Path(f"/dev/fd/{reading}")) == ("one", "two")
    os.close(reading)


def test_json_is_utf_8_with_or_without_a_mark_and_bounded(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(["\u2028"], ensure_ascii=False).encode())
    assert fields.read_json(path) == ["\u2028"]
    for content, message in (
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("[" + "9" * 5000 + "]", "not JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is twice"),
        ("[1", "Is the file complete"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message) as caught:
            fields.read_json(path)
        assert str(path) in str(caught.value)
