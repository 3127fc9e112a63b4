"""Every source reads what it documents, is picklable, and names file, place and key of a fault."""

from __future__ import annotations

import json
import pathlib

import pytest

from perception_jax.data.image_paths import find_images
from perception_jax.data.moinst.source import MoinstSource
from perception_jax.data.records import (
    ObjectAnnotation,
    ObjectInstruction,
    Question,
    ReferringExpression,
)
from perception_jax.data.sources import open_source
from perception_jax.data.sources.coco import CocoSource
from perception_jax.data.sources.combine import InMemory
from perception_jax.data.sources.folder import ImageFolder
from perception_jax.data.sources.jsonl import JsonlSource
from perception_jax.data.sources.llava import LlavaSource
from perception_jax.data.sources.names import display_names
from perception_jax.data.sources.objects import ObjectLines
from perception_jax.errors import ConfigError, DataError, ImageError
from tests.image_files import assert_sound, png, write

# --- Image folder -------------------------------------------------------------------------------


def test_image_folder(tmp_path):
    for name in ("red_fox/2.png", "red_fox/1.JPG", "owl/x.png", "plain.png", ".hidden/h.png"):
        write(tmp_path / name, png())
    write(tmp_path / "owl/x.txt", "an owl at night \n\n a bird\n")
    write(tmp_path / "owl/notes.md", "no image")
    source = open_source(tmp_path)
    assert isinstance(source, ImageFolder)
    assert_sound(source, 4)
    assert [record.id for record in source] == [
        "owl/x.png",
        "plain.png",
        "red_fox/1.JPG",
        "red_fox/2.png",
    ]
    assert [record.captions for record in source] == [
        ("an owl at night", "a bird"),
        (),
        ("a photo of a red fox.",),
        ("a photo of a red fox.",),
    ]
    classes = [(record.class_name, record.raw_class_name) for record in source]
    assert classes == [("owl", "owl"), ("", ""), *[("red fox", "red_fox")] * 2]
    assert open_source(tmp_path, template="{}")[2].captions == ("red fox",)


def test_image_folder_follows_links_but_not_in_circles(tmp_path):
    write(tmp_path / "data/dog/a.jpg", png())
    write(tmp_path / "store/cat/b.jpg", png())
    (tmp_path / "data/cat").symlink_to(tmp_path / "store/cat")
    (tmp_path / "data/dog/c.png").symlink_to(tmp_path / "store/cat/b.jpg")
    (tmp_path / "data/dog/again").symlink_to(tmp_path / "data")
    (tmp_path / "data/gone").symlink_to(tmp_path / "nowhere")
    source = open_source(tmp_path / "data")
    assert [record.id for record in source] == ["cat/b.jpg", "dog/a.jpg", "dog/c.png"]
    assert source.left_out == ("dog/again", "gone")


def test_image_folder_says_what_it_leaves_out(tmp_path, caplog):
    endings = ("jpg", "jpe", "JFIF", "jif", "apng", "avif", "AVIF", "json", "txt", "notes")
    for name in (*(f"a.{ending}" for ending in endings), "b.txt", ".hidden.json"):
        write(tmp_path / name, "a text" if name.endswith("txt") else png())
    source = open_source(tmp_path)
    assert [record.id for record in source] == ["a.JFIF", "a.apng", "a.jif", "a.jpe", "a.jpg"]
    assert source.left_out == ("a.AVIF", "a.avif", "a.json", "a.notes", "b.txt")
    assert "5 images; left out: 2 .avif (as a.AVIF), 1 .json (as a.json)" in caplog.text
    assert find_images(tmp_path) == [tmp_path / record.id for record in source]
    assert caplog.text.count("left out") == 2
    (tmp_path / "only").mkdir()
    write(tmp_path / "only/a.heic", png())
    for read in (ImageFolder, find_images):
        with pytest.raises(DataError, match=r"found none: only 1 \.heic \(as a\.heic\)"):
            read(tmp_path / "only")


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        (("Red_fox", "owl"), ("red fox", "owl")),
        (("Q", "q", "R"), ("Q", "q", "r")),
        (("a_b", "a b", "A b"), ("a_b", "a b", "A b")),
        (("Q", "q", "q "), ("Q", "q", "q ")),
        (("dog", "dog"), ("dog", "dog")),
        (("", "  ", "dog"), ("class 0", "class 1", "dog")),
        (("", "class_0"), ("class 0 ('')", "class 0")),
    ],
)
def test_display_names_are_as_different_as_the_names(raw, shown):
    assert tuple(display_names(dict(enumerate(raw))).values()) == shown


def test_image_folder_faults(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        ImageFolder(tmp_path / "gone")
    with pytest.raises(DataError, match="found none"):
        ImageFolder(tmp_path)
    write(tmp_path / "a.png", png())
    write(tmp_path / "a.txt", b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt: expected UTF-8"):
        ImageFolder(tmp_path)[0]
    with pytest.raises(DataError, match="template"):
        ImageFolder(tmp_path, template="a photo")


# --- JSONL --------------------------------------------------------------------------------------

FULL_LINE = {
    "image": "pictures/a.png",
    "id": "first",
    "captions": ["two dogs", "dogs"],
    "objects": [
        {"name": "Big_dog", "box": [0, 0, 4.5, 6], "attributes": {"colour": "red"}},
        {"name": "dog", "box": [4, 1, 8, 6], "caption": "a dog", "object_id": 7, "crowd": True},
    ],
    "referring": [{"text": "the right dog", "target": 1}],
    "questions": [{"text": "How many?", "answer": "2", "options": ["1", "2"], "kind": "count"}],
    "instructions": [{"text": "Find the cat.", "target": None}],
    "absent": ["cat"],
    "extras": {"source": "mine"},
}


def jsonl(folder: pathlib.Path, *lines: dict | str) -> pathlib.Path:
    write(folder / "pictures/a.png", png())
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return write(folder / "data.jsonl", text)


def test_jsonl(tmp_path):
    short = {"image": "pictures/a.png", "caption": "caf\u00e9"}
    source = open_source(jsonl(tmp_path, FULL_LINE, "", short))
    assert isinstance(source, JsonlSource)
    assert_sound(source, 2)
    record = source[0]
    assert (record.id, record.captions, record.absent) == ("first", ("two dogs", "dogs"), ("cat",))
    assert record.objects == (
        ObjectAnnotation(
            name="big dog",
            raw_name="Big_dog",
            box=(0.0, 0.0, 4.5, 6.0),
            attributes={"colour": "red"},
        ),
        ObjectAnnotation(
            name="dog", box=(4.0, 1.0, 8.0, 6.0), captions=("a dog",), object_id=7, crowd=True
        ),
    )
    assert record.referring == (ReferringExpression(text="the right dog", target=1),)
    assert record.questions == (
        Question(text="How many?", answers=("2",), options=("1", "2"), kind="count"),
    )
    assert record.instructions == (ObjectInstruction(text="Find the cat.", target=None),)
    assert record.extras == {"source": "mine"}
    assert (source[1].id, source[1].captions) == ("data.jsonl:3", ("caf\u00e9",))
    elsewhere = JsonlSource(tmp_path / "data.jsonl", images=tmp_path / "other")
    assert elsewhere[1].image == tmp_path / "other/pictures/a.png"
    assert type(open_source(tmp_path)) is JsonlSource


def test_jsonl_of_texts_without_images(tmp_path):
    said = [{"role": "user", "text": "Hello"}, {"role": "assistant", "text": "Hi"}]
    both = jsonl(tmp_path, {"text": "Once upon a time"}, {"id": "b", "conversation": said})
    source = open_source(both)
    found = [(record.id, record.images, record.text) for record in source]
    assert found == [("data.jsonl:1", (), "Once upon a time"), ("b", (), "")]
    assert [turn.text for turn in source[1].conversation] == ["Hello", "Hi"]


def box_line(box: list, **more) -> dict:
    return {"image": "pictures/a.png", "objects": [{"name": "dog", "box": box}], **more}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: not JSON"),
        ("[1]", r":2: expected an object \{…\}, found \[1\]"),
        ({"caption": "x"}, r":2: expected the key 'image', found only \['caption'\]"),
        ({"image": "a", "captoin": "x"}, ":2: unknown key 'captoin'. Did you mean caption"),
        ({"image": "a", "caption": " "}, ":2: caption: expected a text that is not blank"),
        ({"image": "a", "caption": "x", "captions": ["x"]}, "found both"),
        ({"image": "a", "captions": ["x", 3]}, r":2: captions\[1\]: expected a text"),
        ({"image": "a", "width": 0, "height": 2}, "width: expected at least 1 pixel"),
        (box_line([0, 0, 1]), r":2: objects\[0\]: box: expected a list of 4 finite numbers"),
        (box_line([0, 0, 1, "2"]), "4 finite numbers"),
        (box_line([0, 0, 1, float("nan")]), "4 finite numbers"),
        (box_line([3, 0, 3, 2]), r"objects\[0\]: box: expected x1 < x2"),
        (box_line([0, 0, 10, 6], width=8, height=6), r"leaves the image of 8×6.*outside=\"clip\""),
        (box_line([0, 0, 1, 1], referring=[{"text": "it", "target": 1}]), "below the 1 objects"),
        ({"image": "a", "questions": [{"text": "Who?"}]}, r"questions\[0\]: expected.*'answer'"),
        ({"image": "a", "objects": [{"name": "x", "bbox": [0, 0, 1, 1]}]}, "Did you mean box"),
        ({"image": "pictures/a.png", "id": "first"}, "'first' is already the id of line 1"),
    ],
)
def test_jsonl_faults_name_file_line_and_key(tmp_path, line, message):
    path = jsonl(tmp_path, FULL_LINE, line)
    with pytest.raises(DataError, match=message) as caught:
        JsonlSource(path)
    assert f"{path}:2" in str(caught.value)


def test_jsonl_boxes_against_the_image_itself(tmp_path):
    """Without a size in the line, the image's header decides, when the record is read."""
    outside = box_line([-2, 0, 5, 6], referring=[{"text": "it", "target": 0}])
    gone = box_line([9, 0, 12, 6], referring=[{"text": "it", "target": 0}])
    gone["objects"] += [{"name": "cat", "box": [0, 0, 8.4, 6]}]
    gone["referring"] += [{"text": "the cat", "target": 1}]
    path = jsonl(tmp_path, outside, gone)
    with pytest.raises(DataError, match=r"data\.jsonl:1: objects\[0\]: box: .*leaves the image"):
        JsonlSource(path)[0]
    clipped = JsonlSource(path, outside="clip")
    assert clipped[0].objects[0].box == (0, 0, 5, 6)
    assert [(o.name, o.box) for o in clipped[1].objects] == [("cat", (0, 0, 8, 6))]
    assert clipped[1].referring == (ReferringExpression(text="the cat", target=0),)
    (tmp_path / "pictures/a.png").unlink()
    with pytest.raises(ImageError, match=r"a\.png"):
        JsonlSource(path)[0]


def test_jsonl_of_nothing(tmp_path):
    with pytest.raises(DataError, match="found none"):
        JsonlSource(write(tmp_path / "a.jsonl", "\n\n"))
    with pytest.raises(DataError, match="no such file"):
        JsonlSource(tmp_path / "b.jsonl")


# --- COCO and LVIS ------------------------------------------------------------------------------


def coco() -> dict:
    return {
        "images": [
            {"id": 5, "file_name": "a.png", "width": 8, "height": 6},
            {"id": 3, "file_name": "b.png", "width": 8, "height": 6},
        ],
        "categories": [{"id": 1, "name": "fire_hydrant"}, {"id": 9, "name": "Dog"}],
        "annotations": [
            {"id": 11, "image_id": 3, "category_id": 9, "bbox": [0, 1, 2, 3], "iscrowd": 1},
            {"id": 12, "image_id": 5, "category_id": 1, "bbox": [1.5, 0, 7, 6]},
            {"id": 13, "image_id": 3, "category_id": 1, "bbox": [4, 4, 1, 1]},
        ],
    }


def coco_folder(root: pathlib.Path, content: dict) -> pathlib.Path:
    for name in ("a.png", "b.png"):
        write(root / "train2017" / name, png())
    return write(root / "annotations/instances_train2017.json", json.dumps(content))


def test_coco_instances_and_captions(tmp_path):
    path = coco_folder(tmp_path, coco())
    texts = [{"id": k, "image_id": 3, "caption": f" text {k}\n"} for k in range(2)]
    captions = write(tmp_path / "c.json", json.dumps({**coco(), "annotations": texts}))
    source = open_source(path, captions=captions)
    assert isinstance(source, CocoSource)
    assert_sound(source, 2)
    assert [record.id for record in source] == ["5", "3"]
    assert source[0].image == tmp_path / "train2017/a.png"
    # 1.5 + 7 is half a pixel too wide: rounding, cut without a word.
    assert source[0].objects == (
        ObjectAnnotation(
            name="fire hydrant",
            raw_name="fire_hydrant",
            box=(1.5, 0.0, 8.0, 6.0),
            category_id=1,
            object_id=12,
        ),
    )
    assert [(o.name, o.box, o.crowd) for o in source[1].objects] == [
        ("dog", (0, 1, 2, 4), True),
        ("fire hydrant", (4, 4, 5, 5), False),
    ]
    assert [record.captions for record in source] == [(), ("text 0", "text 1")]
    alone = CocoSource(captions, images=tmp_path / "train2017")
    assert [record.captions for record in alone] == [(), ("text 0", "text 1")]
    assert alone[1].objects == ()


def test_lvis_is_federated(tmp_path):
    content = coco()
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
    content["images"][0] |= {"neg_category_ids": [9], "not_exhaustive_category_ids": [1]}
    source = CocoSource(coco_folder(tmp_path, content))
    assert source[0].absent == ("dog",)
    assert source[0].image_id == 5
    assert source[0].not_exhaustive == ("fire hydrant",)
    assert source[1].absent == ()
    assert source[1].image == tmp_path / "train2017/b.png"


def changed(table: str, index: int, **values) -> dict:
    content = coco()
    content[table][index] |= values
    return {**content, table: [{k: v for k, v in e.items() if v != ""} for e in content[table]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "lists 'images' and 'annotations'"),
        ({**coco(), "images": []}, "images: expected at least one"),
        (changed("images", 1, id=5), "unique ids"),
        (changed("images", 0, width=""), r"images\[0\]: expected the key 'width'"),
        (changed("images", 0, file_name=""), r"images\[0\]: expected 'file_name' or 'coco_url'"),
        (changed("images", 1, neg_category_ids=[2]), r"images\[1\]: neg_category_ids: .*found 2"),
        (changed("annotations", 0, image_id=4), r"annotations\[0\]: image_id: .* found 4"),
        (changed("annotations", 2, category_id=2), r"annotations\[2\]: category_id: .*found 2"),
        (changed("annotations", 1, bbox=[0, 0, 3]), r"annotations\[1\]: bbox: .*4 finite numbers"),
        (changed("annotations", 1, bbox=[0, 0, 12, 3]), r"annotations\[1\]: bbox: .*leaves the"),
        (changed("annotations", 1, bbox=[0, 0, 0, 3]), r"expected x1 < x2"),
        (changed("categories", 1, name=""), r"categories\[1\]: expected the key 'name'"),
    ],
)
def test_coco_faults_name_file_entry_and_key(tmp_path, content, message):
    path = coco_folder(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        CocoSource(path)
    assert str(path) in str(caught.value)


def test_coco_clips_only_when_told(tmp_path):
    content = changed("annotations", 1, bbox=[-4, 0, 20, 3])
    content["annotations"][2]["bbox"] = [4, 4, 0, 1]
    source = CocoSource(coco_folder(tmp_path, content), outside="clip")
    assert source[0].objects[0].box == (0, 0, 8, 3)
    assert [o.object_id for o in source[1].objects] == [11]


def test_coco_says_where_it_looked_for_images(tmp_path):
    path = write(tmp_path / "x.json", json.dumps(coco()))
    with pytest.raises(DataError, match=r"'a\.png' in .*images=FOLDER"):
        CocoSource(path)
    with pytest.raises(DataError, match="not JSON"):
        CocoSource(write(path, "{"))
    with pytest.raises(DataError, match="No such file"):
        CocoSource(tmp_path / "gone.json")


# --- Choosing a reader --------------------------------------------------------------------------


def test_open_source_says_what_it_tried(tmp_path):
    with pytest.raises(DataError, match="found nothing there"):
        open_source(tmp_path / "gone")
    with pytest.raises(DataError, match=r"Tried: one \.jsonl.*\.parquet.*images"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"found '\.csv'"):
        open_source(write(tmp_path / "x.csv", "a"))
    write(tmp_path / "a.png", png())
    with pytest.raises(ConfigError, match=r"unknown option 'templat'. Did you mean template"):
        open_source(tmp_path, templat="{}")
    jsonl(tmp_path, FULL_LINE)
    write(tmp_path / "other.jsonl", "")
    with pytest.raises(DataError, match=r"one \.jsonl file, found data\.jsonl, other\.jsonl"):
        open_source(tmp_path)


LINES = {
    "jsonl": {"image": "a.png", "caption": "x"},
    "objects": {"image": "a.png", "class": "dog", "caption": "x"},
    "moinst": {"image_id": 1, "file": "a.png", "objects": [{"class": "dog", "class_id": 0}]},
    "llava": {"conversations": [{"from": "human", "value": "Hi"}]},
}
READERS = {
    "folder": ImageFolder,
    "jsonl": JsonlSource,
    "objects": ObjectLines,
    "moinst": MoinstSource,
    "llava": LlavaSource,
    "coco": CocoSource,
}


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.json"])
@pytest.mark.parametrize("kind", LINES)
def test_kinds_of_lines_are_guessed_by_their_keys(tmp_path, kind, name):
    """Also in a file that ends as COCO's do; a file and the only such one in its folder alike."""
    line = json.dumps(LINES[kind]) + "\n"
    path = write(tmp_path / name, line)
    assert type(open_source(write(tmp_path / f"text/{name}", line), kind=kind)) is READERS[kind]
    assert type(open_source(path)) is READERS[kind]
    if name != "x.json":
        assert type(open_source(tmp_path)) is READERS[kind]


def test_a_named_kind_opens_a_file_of_any_ending(tmp_path):
    for kind, line in LINES.items():
        assert len(open_source(write(tmp_path / "x.txt", json.dumps(line)), kind=kind)) == 1
    write(tmp_path / "a.png", png())
    write(tmp_path / "b.png", png())
    path = write(tmp_path / "annotations.dat", json.dumps(coco()))
    assert type(open_source(path, kind="coco")) is CocoSource
    with pytest.raises(ConfigError, match=r"kind: there is no 'cocco'\. Did you mean coco"):
        open_source(path, kind="cocco")
    with pytest.raises(DataError, match=r"one \.json file in it, found none"):
        open_source(tmp_path, kind="coco")


def test_what_is_not_certain_is_not_guessed(tmp_path):
    folder = coco_folder(tmp_path, coco()).parent
    assert type(open_source(folder)) is CocoSource
    write(folder / "a.png", png())
    with pytest.raises(DataError, match=r"found instances_train2017\.json, which may annotate"):
        open_source(folder)
    assert type(open_source(folder, kind="folder")) is ImageFolder
    write(folder / "x.jsonl", json.dumps({"file_name": "a.png", "text": "x"}))
    with pytest.raises(DataError, match=r"x\.jsonl:1: .*found \['file_name', 'text'\].*kind="):
        open_source(folder)
    write(folder / "x.parquet", "")
    with pytest.raises(DataError, match=r"one kind of file, found x\.jsonl, x\.parquet"):
        open_source(folder)


# --- In memory ----------------------------------------------------------------------------------


class CountingSource:
    """Folder records that count how often each was read."""

    def __init__(self, source):
        self.source, self.reads = source, []

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        record = self.source[index]
        self.reads.append(index)
        return record


def test_memory_reads_each_record_once_and_keeps_what_it_is_told(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.png", png())
        write(tmp_path / f"{name}.txt", f"picture {name}")
    counting = CountingSource(ImageFolder(tmp_path))
    source = InMemory(counting, keep=("captions",))
    assert_sound(source, 3)
    reads = list(counting.reads)
    for index in range(3):
        kept, full = source[index], counting.source[index]
        assert (kept.id, kept.captions, kept.image) == (full.id, full.captions, full.image)
        assert (kept.objects, kept.extras) == ((), {})
    assert counting.reads == reads == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"found \['caption'\]"):
        InMemory(counting, keep=("caption",))
