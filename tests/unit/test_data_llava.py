"""LLaVA's conversations: what is read, by little memory, and how a faulty file is named."""

from __future__ import annotations

import json
import pickle

import pytest

from perception_jax.data.records import Turn
from perception_jax.data.sources import json_list, open_source
from perception_jax.data.sources.json_list import IndexedList
from perception_jax.data.sources.llava import LlavaSource
from perception_jax.errors import DataError
from tests.image_files import png, write


def row(question: str, answer: str, **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**more, "conversations": turns}


ROWS = [
    row("<image>\nWhat is thís?", "A büs. 🚌", id="33471", image="coco/train2017/1.jpg"),
    row("Say <image>.", "No.", id="33471", model=""),  # text alone, the id again
    row("Compare <image> and <image>.", "Equal.", image=["a.png", "gqa/b.png"], id=3),
    row("Hi", "", image=None),
]


def expected_turns(entry: dict) -> tuple[Turn, ...]:
    roles = {"human": "user", "gpt": "assistant"}
    return tuple(Turn(role=roles[t["from"]], text=t["value"]) for t in entry["conversations"])


@pytest.mark.parametrize("layout", ["list", "indented", "ascii", "lines"])
@pytest.mark.parametrize("block", [2**20, 7])
def test_rows_of_a_list_or_of_lines(tmp_path, monkeypatch, layout, block):
    monkeypatch.setattr(json_list, "_BLOCK", block)
    text = {
        "list": json.dumps(ROWS, ensure_ascii=False),
        "indented": "\ufeff\n " + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n\n",
        "ascii": json.dumps(ROWS),
        "lines": "\n\n".join(json.dumps(one) for one in ROWS),
    }[layout]
    name = "chat.jsonl" if layout == "lines" else "chat.json"
    write(tmp_path / "a.png", png())
    source = open_source(write(tmp_path / name, text), images=tmp_path)
    assert isinstance(source, LlavaSource)
    again = pickle.loads(pickle.dumps(source))
    assert [record.id for record in again] == ["0:33471", "1:33471", "2:3", "3"]
    assert [record.conversation for record in again] == [expected_turns(one) for one in ROWS]
    assert [record.images for record in again] == [
        (tmp_path / "coco/train2017/1.jpg",),
        (),
        (tmp_path / "a.png", tmp_path / "gqa/b.png"),
        (),
    ]


def test_a_large_list_is_scanned_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "_BLOCK", 2**10)
    rows = [row(f"<image>\n{k}", "é" * (k % 700), image="a.png") for k in range(2000)]
    path = write(tmp_path / "chat.json", json.dumps(rows, ensure_ascii=False))
    held = []
    more = json_list._Stream._more

    def watched(stream, size):
        found = more(stream, size)
        held.append(len(stream._text))
        return found

    monkeypatch.setattr(json_list._Stream, "_more", watched)
    values = IndexedList(path)
    assert [value for _, value in values.scan()] == rows
    assert max(held) < 2**13 < path.stat().st_size / 100
    assert [values[k] for k in (0, 1234, 1999)] == [rows[k] for k in (0, 1234, 1999)]
    with pytest.raises(IndexError):
        values[2000]


SOUND = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[{SOUND}, {SOUND[:-1]}", r"chat\.json\[1\]: not JSON \(.*Is the file complete"),
        (f"[{SOUND}, {{'a': 1}}, {SOUND}]", r"chat\.json\[1\]: not JSON \(Expecting property name"),
        (f"[{SOUND} {SOUND}]", r"chat\.json\[1\]: expected a comma before it"),
        (f"[{SOUND}] x", r"chat\.json: expected nothing behind the list"),
        (f"[{SOUND}, 7]", r"chat\.json\[1\]: expected an object"),
        ("[]", r"chat\.json: expected at least one value"),
        ('[{"id": "a", "id": "b"}]', r"chat\.json\[0\]: .*'id' is twice"),
        ("[{}]", r"chat\.json\[0\]: expected the key 'conversations'"),
        ('[{"conversations": []}]', r"chat\.json\[0\]: conversations: expected at least one turn"),
        (
            json.dumps([{"conversations": [{"from": "user", "value": "x"}]}]),
            r'conversations\[0\]: from: expected "human" \(questions\) or "gpt"',
        ),
        (
            json.dumps([{"conversations": [{"from": "human", "text": "x"}]}]),
            r"conversations\[0\]: expected the key 'value'",
        ),
        (json.dumps([row("x", "y", image=7)]), r"chat\.json\[0\]: image: expected a text"),
    ],
)
def test_a_faulty_file_is_named_with_row_and_key(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        LlavaSource(write(tmp_path / "chat.json", text))


def test_other_encodings_and_missing_places(tmp_path):
    path = tmp_path / "chat.json"
    path.write_bytes(json.dumps(ROWS, ensure_ascii=False).encode("latin-1", "replace"))
    with pytest.raises(DataError, match="expected UTF-8 text, found another byte near byte"):
        LlavaSource(path)
    path.write_text(json.dumps(ROWS), encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        LlavaSource(path)
    with pytest.raises(DataError, match="no such file"):
        LlavaSource(tmp_path / "other.json")
    path.write_text(json.dumps(ROWS))
    with pytest.raises(DataError, match="expected the folder of the images"):
        LlavaSource(path, images=tmp_path / "images")
    with pytest.raises(
        DataError, match=r"found none of the first 3, e\.g\. .*1\.jpg\. Give the fo"
    ):
        LlavaSource(path)


def test_a_changed_file_is_noticed(tmp_path):
    write(tmp_path / "a.png", png())
    path = write(tmp_path / "chat.json", json.dumps(ROWS))
    source = LlavaSource(path)
    write(path, json.dumps(ROWS, indent=3))
    with pytest.raises(DataError, match="Has the file changed"):
        source[1]


def test_a_list_of_files_stays_a_list_of_images(tmp_path):
    write(tmp_path / "a.png", png())
    path = write(tmp_path / "x.json", json.dumps(["a.png"]))
    with pytest.raises(DataError, match=r"x\.json\[0\]: expected an object"):
        open_source(path)
