"""Records of every kind of source: text only, several images, conversations, several answers."""

from __future__ import annotations

import html
import json

import numpy as np
import PIL.Image
import pytest

from launch.data_page import add_record
from perception_jax.data.loader import make_loader
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import ObjectAnnotation, Question, Record, Turn
from perception_jax.data.sources import open_source
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.data.transforms import ImageTextTransform
from perception_jax.errors import DataError
from perception_jax.viz.html_report import Report

GREY = np.full((6, 8, 3), 90, np.uint8)
TALK = (
    Turn(role="user", text="What is <region>?", targets=(0,)),
    Turn(role="assistant", text="A dog."),
)


@pytest.fixture
def lines(tmp_path):
    """One record of everything, one of two images, one of text alone."""
    PIL.Image.fromarray(GREY).save(tmp_path / "a.png")
    full = {
        "image": "a.png",
        "id": "full",
        "image_id": 5,
        "class_name": "Dog_park",
        "objects": [
            {
                "name": "Dog",
                "box": [0, 0, 4, 6],
                "captions": ["a dog", "it sits"],
                "salient": True,
                "area": 20.5,
            }
        ],
        "questions": [{"text": "How many?", "answers": ["1", "one", "1"], "question_id": 9}],
        "conversation": [
            {"role": "user", "text": "What is <region>?", "targets": [0]},
            {"role": "assistant", "text": "A dog."},
        ],
        "absent": ["Cat"],
        "not_exhaustive": ["Red_fox"],
    }
    two = {"images": ["a.png", "a.png"], "conversation": full["conversation"][1:]}
    text = {"id": "text", "conversation": full["conversation"][1:]}
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, (full, two, text))))
    return path


def test_json_lines_fill_every_field(lines):
    full, two, text = (open_source(lines)[k] for k in range(3))
    assert full == Record(
        id="full",
        images=(lines.parent / "a.png",),
        size=(8, 6),
        image_id=5,
        class_name="dog park",
        raw_class_name="Dog_park",
        objects=(
            ObjectAnnotation(
                name="dog",
                raw_name="Dog",
                box=(0.0, 0.0, 4.0, 6.0),
                captions=("a dog", "it sits"),
                area=20.5,
                salient=True,
            ),
        ),
        questions=(Question(text="How many?", answers=("1", "one", "1"), question_id=9),),
        conversation=TALK,
        absent=("cat",),
        not_exhaustive=("red fox",),
    )
    assert (full.questions[0].answer, full.objects[0].caption) == ("1", "a dog")
    assert (len(two.images), two.size, two.conversation) == (2, None, TALK[1:])
    assert (text.id, text.images, text.conversation) == ("text", (), TALK[1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["a.png"]}, 'expected "image" or "images", found both'),
        ({"conversation": [{"role": "human", "text": "x"}]}, r"role: expected one of system, user"),
        ({"conversation": [{"role": "user", "text": "x", "targets": [0]}]}, r"\[0\]: targets"),
        ({"questions": [{"text": "Why?"}]}, r"questions\[0\]: expected the key 'answer'"),
        (
            {"questions": [{"text": "Why?", "answer": "a", "answers": ["b"]}]},
            r'questions\[0\]: expected "answer" or "answers", found both',
        ),
        (
            {"objects": [{"name": "a", "box": [0, 0, 1, 1], "caption": "x", "captions": []}]},
            r'objects\[0\]: expected "caption" or "captions", found both',
        ),
    ],
)
def test_faults_of_the_new_fields_name_their_place(tmp_path, change, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"image": "a.png", **change}))
    with pytest.raises(DataError, match=rf"a\.jsonl:1.*{message}"):
        open_source(path)


def test_objects_belong_to_one_image(tmp_path):
    for images in ((), (GREY, GREY)):
        with pytest.raises(DataError, match=f"'x': expected one image .* found {len(images)}"):
            Record(id="x", images=images, objects=(ObjectAnnotation(name="dog", box=None),))
    path = tmp_path / "a.jsonl"
    line = {"images": ["a", "b"], "objects": [{"name": "dog", "box": [0, 0, 1, 1]}]}
    path.write_text(json.dumps(line))
    with pytest.raises(DataError, match=r"a\.jsonl:1: objects: expected one image, found 2"):
        open_source(path, kind="jsonl")
    with pytest.raises(DataError, match=r"'Why\?': expected at least one answer"):
        Question(text="Why?", answers=())


@pytest.mark.parametrize(("images", "found"), [((), "a text-only record"), ((GREY, GREY), "2 ima")])
def test_what_needs_one_image_names_the_record_that_has_none_or_several(images, found):
    """Its image is never dropped in silence: each such record is refused, many stop the loader."""
    record = Record(id="odd one", images=images, captions=("a text",))
    transform = ImageTextTransform(
        processor=ImageProcessor(size=8), tokenizer=ClipTokenizer.shipped(600, 8)
    )
    with pytest.raises(DataError, match=f"'odd one': expected exactly one image, found {found}"):
        transform(record, np.random.default_rng(0))
    sound = Record(id="sound", images=(GREY,), captions=("a text",))
    batches = make_loader([sound, record, record], transform, batch_size=2, seed=0)
    with pytest.raises(DataError, match=f"expected exactly one image, found {found}"):
        list(zip(range(5), batches, strict=False))


def test_the_data_page_shows_them(lines, tmp_path):
    report = Report("page")
    for record in (open_source(lines)[k] for k in range(3)):
        add_record(report, record, {}, None)
    page = html.unescape(report.write(tmp_path / "page.html").read_text())
    assert page.count("<img ") == 3
    for text in (
        "dog park (“Dog_park” in the source)",
        "0: dog at 0, 0, 4, 6 (“Dog” in the source); area 20.5, salient True; a dog; it sits",
        "How many? → 1 ×2, one",
        "What is <region>? → 0 (dog)",
        "A dog.",
        "not exhaustive",
        "red fox",
    ):
        assert text in page
