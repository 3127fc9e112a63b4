"""MOInst's canonical record, its imports, and the rebuild; what the golden cases leave out."""

from __future__ import annotations

import collections
import json
import pathlib

import pytest

from launch import common, import_moinst
from perception_jax.data.moinst import captions, lvis, tables
from perception_jax.data.moinst.boxes import SourceBoxes
from perception_jax.data.moinst.names import clean_name, mentions
from perception_jax.data.moinst.published import import_published
from perception_jax.data.moinst.record import (
    MoinstClass,
    MoinstImage,
    MoinstObject,
    read_classes,
    read_images,
    to_json,
    write_classes,
    write_images,
)
from perception_jax.data.moinst.source import MoinstSource
from perception_jax.data.moinst.split import stratified_split
from perception_jax.data.records import ObjectAnnotation, ObjectInstruction
from perception_jax.data.sources import open_source
from perception_jax.data.sources.jsonl import JsonlSource
from perception_jax.errors import ConfigError, DataError, PerceptionError


def write_json(path: pathlib.Path, content) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def row(**values) -> dict:
    made = {
        "image_id": 1,
        "file_name": "1.jpg",
        "image_path": "a/b/train2017/1.jpg",
        "category_id": 18,
        "object_id": 7,
        "caption": "a dog",
    }
    return {**made, **values}


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bead_(jewelry)", "bead"),
        ("Tabasco_sauce", "tabasco sauce"),
        ("monitor_(computer_equipment) computer_monitor", "monitor"),
        ("(odd)", "(odd)"),
    ],
)
def test_clean_names(name, words):
    assert clean_name(name) == words


def test_names_are_found_as_whole_words_in_either_number():
    found = [("wine_glass", "Two Wine Glasses."), ("scissors", "a scissor"), ("knife", "knives")]
    found += [("T-shirt", "a t shirt"), ("person", "people"), ("human", "humans"), ("fly", "flies")]
    for name, text in found:
        assert mentions(text, [name]), (name, text)
    for name, text in [("cat", "a category"), ("glass", "a glas"), ("car", "a carpet")]:
        assert not mentions(text, [name]), (name, text)
    assert mentions("an aeroplane", ["airplane", "aeroplane"])


# --- Tables -------------------------------------------------------------------------------------


def test_bundled_tables():
    sizes = {name: len(tables.bundled(name)) for name in tables.BUNDLED}
    assert sizes == {"lvis_v1": 1203, "lvis_v0.5": 1230, "coco80": 80, "coco_stuff": 171}
    coco, stuff = tables.bundled("coco80"), tables.bundled("coco_stuff")
    assert (coco[1].name, coco[90].name, 12 in coco) == ("person", "toothbrush", False)
    assert {k: one.name for k, one in stuff.items() if k <= 90} == {
        k: one.name for k, one in coco.items()
    }
    assert (min(set(stuff) - set(coco)), stuff[182].name) == (92, "wood")
    assert stuff[171].names() == ("wall-brick", "wall", "brick wall")
    lvis_names = tables.bundled("lvis_v1")
    assert lvis_names[1].names() == ("aerosol_can", "spray_can")
    assert list(lvis_names) == list(range(1, 1204))


def captioned(name: str, count: int, text: str = "a {} here", step: int = 1) -> list:
    found = list(tables.bundled(name).values())[::step][:count]
    return [(one.id, (text.format(clean_name(one.names()[-1]).upper()),)) for one in found]


def test_the_table_is_found_by_the_captions():
    assert tables.detect(captioned("lvis_v1", 60, step=7))[0] == "lvis_v1"
    assert tables.detect(captioned("lvis_v0.5", 60, step=7))[0] == "lvis_v0.5"
    # All ids are COCO's, so COCO-Stuff, which contains it, is no rival.
    assert tables.detect(captioned("coco80", 40))[0] == "coco80"
    assert tables.detect(captioned("coco_stuff", 171))[0] == "coco_stuff"
    half = captioned("lvis_v1", 49, step=7) + captioned("lvis_v1", 51, "nothing", step=11)
    with pytest.raises(DataError, match=r"categories: .*found lvis_v1 49%"):
        tables.detect(half)
    # 2 of 3 rows fit LVIS v1 and 2 of 3 v0.5: nobody is 15 points ahead.
    one, other = captioned("lvis_v1", 3, step=300), captioned("lvis_v0.5", 3, step=300)
    unsure = [(k, (*a, *b)) for (k, a), (_, b) in zip(one, other, strict=True)]
    with pytest.raises(DataError, match=r"lvis_v1 100%, lvis_v0.5 100%"):
        tables.detect(unsure)


# --- Published files ----------------------------------------------------------------------------


def test_classes_are_found_by_captions_in_a_whole_import(tmp_path):
    rows = [
        row(image_id=k, object_id=k, category_id=number, caption=texts[0])
        for k, (number, texts) in enumerate(captioned("lvis_v1", 40, step=29))
    ]
    imported = import_published(write_json(tmp_path / "x.json", {"rows": rows}))
    assert (imported.table, imported.shares["lvis_v1"]) == ("lvis_v1", 1.0)
    assert imported.images["train"][1].objects[0].name == tables.bundled("lvis_v1")[30].name
    assert [one.class_id for one in imported.classes] == list(range(40))


def test_foreign_rows_by_their_aliases(tmp_path):
    rows = [
        {"image_id": "b", "img": "x/b.jpg", "label": "dog", "text": " a dog ", "prompt": "dog?"},
        {"image_id": "b", "img": "x/b.jpg", "class": "cat", "sentence": "a cat"},
        {"image_id": "a", "file": "a.jpg", "object": "cat", "answer": "a cat", "description": ""},
    ]
    imported = import_published(write_json(tmp_path / "x.json", {"items": rows[:2]}))
    [image] = imported.images["train"]
    assert (image.image_id, image.file, imported.table) == (
        "b",
        "x/b.jpg",
        "the records' own names",
    )
    assert [(o.name, o.class_id, o.captions, o.instruction) for o in image.objects] == [
        ("dog", 1, ("a dog",), "dog?"),
        ("cat", 0, ("a cat",), None),
    ]
    # The first alias that is there counts, blank or not.
    with pytest.raises(DataError, match="1 of 3 rows lack caption"):
        import_published(write_json(tmp_path / "x.json", rows))
    path = write_json(tmp_path / "x.json", rows[:2])
    [image] = import_published(path, categories="coco80").images["train"]
    assert [(o.class_id, o.source_category_id) for o in image.objects] == [(1, 18), (0, 17)]


def test_images_are_looked_up_under_the_root_and_nowhere_else(tmp_path):
    root = tmp_path / "root"
    for name in ("train2017/1.jpg", "deep/val2014/2.jpg", "val2014/3.jpg"):
        write_json(root / name, 0)
    write_json(tmp_path / "secret.jpg", 0)
    rows = [
        row(image_id=1, object_id=1, image_path="/data/coco/train2017/1.jpg"),
        row(image_id=2, object_id=2, image_path="deep\\val2014\\2.jpg"),
        row(image_id=3, object_id=3, image_path="", file_name="x/3.jpg"),
    ]
    path = write_json(tmp_path / "x.json", rows)
    imported = import_published(path, categories="coco80", images=root)
    files = [image.file for image in imported.images["train"]]
    assert files == ["train2017/1.jpg", "deep/val2014/2.jpg", "val2014/3.jpg"]
    rows[0] |= {"image_path": "../secret.jpg", "file_name": "../secret.jpg"}
    with pytest.raises(DataError, match="1 of 3 rows lack image"):
        import_published(write_json(path, rows), categories="coco80", images=root)


def test_up_to_one_percent_of_bad_rows_is_dropped(tmp_path):
    """Each kind by itself: one row in 100 of each goes, two of one kind stop the import."""
    rows = [row(image_id=k, object_id=k) for k in range(100)]
    rows[3] |= {"caption": None}
    rows[5] |= {"category_id": 9999}
    rows[7] |= {"image_id": None}
    path = write_json(tmp_path / "x.json", rows)
    imported = import_published(path, categories="coco80")
    assert imported.report["train"]["rows_dropped"] == 3
    assert imported.report["train"]["images"] == 97
    # An object with two classes has none.
    rows[9] |= {"image_id": 8, "object_id": 8, "category_id": 17}
    with pytest.raises(DataError, match="2 of 100 rows lack class"):
        import_published(write_json(path, rows), categories="coco80")


def test_excluded_images_and_boxes_of_the_source(tmp_path):
    rows = [row(image_id=k, object_id=10 + k, category_id=17 + k % 2) for k in range(4)]
    path = write_json(tmp_path / "x.json", rows)
    imported = import_published(path, path, categories="coco80", exclude={3, 99})
    assert [len(imported.images[part]) for part in ("train", "test")] == [3, 4]
    assert imported.report["train"]["images_excluded"] == 1
    assert "3 images are in train and in test" in imported.warnings()
    boxes = [
        {"id": 10, "image_id": 0, "category_id": 17, "bbox": [1, 2, 3, 4]},
        {"id": 11, "image_id": 0, "category_id": 18, "bbox": [1, 2, 3, 4]},  # another image's
        {"id": 12, "image_id": 2, "category_id": 18, "bbox": [1, 2, 3, 4]},  # another class
    ]
    content = {"images": [{"id": 0, "width": 8, "height": 6}], "annotations": boxes}
    source = SourceBoxes(write_json(tmp_path / "boxes.json", content))
    filled, count = source.fill(imported.images["train"])
    assert (count, filled[0].width, filled[0].objects[0].bbox) == (1, 8, (1.0, 2.0, 3.0, 4.0))
    assert [image.objects[0].bbox for image in filled[1:]] == [None, None]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ([], {}, "expected a list of records"),
        ({"a": [row()], "b": [row()]}, {}, "found several: a, b"),
        ([row(), 3], {}, r"x\.json\[1\]: expected an object"),
        ([row()], {"categories": "coco79"}, "found no file 'coco79'"),
        ({"r": [row()], "categories": [{"id": 1}]}, {}, r"categories\[0\]: name: expected"),
        ({"r": [row()], "categories": [{"id": 1, "name": "a"}] * 2}, {}, "id 1 is also that of"),
    ],
)
def test_files_that_are_refused(tmp_path, content, options, message):
    with pytest.raises(DataError, match=message):
        import_published(write_json(tmp_path / "x.json", content), **options)


# --- Canonical records --------------------------------------------------------------------------

DOG = MoinstObject(
    name="Dog",
    class_id=0,
    source_category_id=18,
    object_id=7,
    captions=("a dog", "a brown dog"),
    bbox=(1.0, 2.0, 3.0, 4.0),
    salient=True,
)
CUP = MoinstObject(
    name="cup_(trophy)", class_id=1, source_category_id=None, object_id=None, instruction="look"
)
IMAGE = MoinstImage(
    image_id=5,
    file="x/5.png",
    width=8,
    height=6,
    objects=(DOG, CUP),
    neg_class_ids=(2,),
    nonexhaustive_class_ids=(1,),
)
BARE = MoinstImage(image_id="b", file="b.png", objects=(CUP,))
CLASSES = tuple(
    MoinstClass(class_id=k, source_category_id=k, name=name)
    for k, name in enumerate(("Dog", "cup_(trophy)", "wine_glass"))
)


def test_records_read_back_and_become_a_source(tmp_path):
    write_images(tmp_path / "train.jsonl", [IMAGE, BARE])
    write_classes(tmp_path / "classes.json", CLASSES)
    assert list(read_images(tmp_path / "train.jsonl")) == [IMAGE, BARE]
    assert read_classes(tmp_path / "classes.json") == CLASSES
    source = open_source(tmp_path / "train.jsonl", images=tmp_path / "pictures")
    assert isinstance(source, MoinstSource)
    assert [record.id for record in source] == ["5", "b"] == [source[k].id for k in range(2)]
    record = source[0]
    assert record.image == tmp_path / "pictures/x/5.png"
    assert record.objects == (
        ObjectAnnotation(
            name="dog",
            raw_name="Dog",
            box=(1.0, 2.0, 4.0, 6.0),
            captions=("a dog", "a brown dog"),
            salient=True,
            category_id=0,
            object_id=7,
        ),
        ObjectAnnotation(name="cup (trophy)", raw_name="cup_(trophy)", box=None, category_id=1),
    )
    assert record.instructions == (ObjectInstruction(text="look", target=1),)
    assert record.absent == ("wine glass",)
    assert (record.image_id, record.size) == (5, (8, 6))
    assert record.not_exhaustive == ("cup (trophy)",)
    bare = source[1]
    assert (bare.image_id, bare.size, bare.not_exhaustive) == ("b", None, ())
    (tmp_path / "other").mkdir()
    other = write_json(tmp_path / "other/x.jsonl", {"image": "a.png"})
    assert isinstance(open_source(other.parent), JsonlSource)


def test_an_object_without_area_is_unsure_not_absent(tmp_path):
    line = to_json(IMAGE)
    line["objects"][0]["bbox"] = [9, 0, 2, 2]
    path = write_json(tmp_path / "a.jsonl", line | {"neg_class_ids": []})
    with pytest.raises(DataError, match=r"a\.jsonl:1: objects\[0\]: bbox: .*leaves the image"):
        MoinstSource(path)[0]
    record = MoinstSource(path, outside="clip")[0]
    assert [one.name for one in record.objects] == ["cup (trophy)"]
    assert record.not_exhaustive == ("cup (trophy)", "dog")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": None}, "image_id: expected a whole number"),
        ({"objects": [{"class_id": 1}]}, r"objects\[0\]: expected the key 'class'"),
        ({"objects": [{"class": "a", "class_id": -1}]}, "class_id: expected 0 or more"),
        ({"objects": [{"class": "a", "class_id": 1, "box": []}]}, "Did you mean bbox"),
        ({"image_id": 4, "objects": [{"class": "a", "class_id": 0}]}, "'dog' elsewhere, here 'a'"),
        ({}, "5 is already the image of line 1"),
        ({"image_id": 4, "neg_class_ids": [8]}, "class 8 has no name"),
    ],
)
def test_faults_of_records_name_file_and_line(tmp_path, change, message):
    first = to_json(IMAGE) | {"neg_class_ids": []}
    lines = [json.dumps(first), "", json.dumps(first | change)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message) as caught:
        MoinstSource(path)
    assert f"{path}:3" in str(caught.value)


# --- Rebuild ------------------------------------------------------------------------------------


def slow_choice(kinds: dict[int, list[int]], count: int, seed: int) -> list[int]:
    """The rule as it is written, without any of the bookkeeping."""
    chosen, counts = [], collections.Counter()
    while len(chosen) < count and len(chosen) < len(kinds):
        free = [k for k in kinds if k not in chosen]
        kind = min({c for k in free for c in kinds[k]}, key=lambda c: (counts[c], c))
        image = min((k for k in free if kind in kinds[k]), key=lambda k: lvis.draw(seed, k))
        chosen.append(image)
        counts.update(kinds[image])
    return chosen


def test_images_are_chosen_as_the_rule_says():
    kinds = {k: sorted({k * k % 7, k % 5, 0 if k % 3 else 6}) for k in range(60)}
    for count in (1, 25, 100):
        assert lvis.balanced_images(kinds, count, 3) == slow_choice(kinds, count, 3)


def lvis_content(images: int) -> dict:
    categories = [
        {"id": 10 + k, "name": f"thing_{k}", "image_count": 50, "synonyms": [f"gadget_{k}"]}
        for k in range(4)
    ]
    return {
        "images": [
            {"id": k, "coco_url": f"http://x/train2017/{k}.jpg", "width": 100, "height": 80}
            for k in range(images)
        ],
        "categories": categories,
        "annotations": [
            {"id": 10 * k + j, "image_id": k, "category_id": 10 + (k + j) % 4, "bbox": [5, 5, s, s]}
            for k in range(images)
            for j, s in enumerate((20, 30, 40))
        ],
    }


def test_the_whole_rebuild_as_programs(tmp_path):
    """LVIS → questions → answers → train and test, with each filter met once."""
    source = write_json(tmp_path / "lvis.json", lvis_content(40))
    val = write_json(tmp_path / "val.json", {"images": [{"id": 0}, {"id": 999}]})
    out = tmp_path / "out"
    assert run_program("lvis", f"--lvis={source}", f"--exclude={val}", f"--out={out}") == 0
    assert json.loads((out / "report.json").read_text())["images_excluded"] == 1
    lines = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert len(lines) == 39 * 3
    assert lines[0]["box"] == [0.0, 0.0, 30.0, 30.0]  # 20×20 at 5, enlarged by half its side
    assert lines[0]["prompt"].startswith("Describe only the thing 1 inside the marked region")
    answers = [
        {"image_id": q["image_id"], "object_id": q["object_id"], "caption": f"a {q['class']}"}
        for q in lines
    ]
    for answer in answers:
        answer["caption"] = answer["caption"].replace("_", " ")
    answers[0]["caption"] = "NONE."
    answers[1]["caption"] = "a dog"
    answers[2]["caption"] += " and" * 24
    answers[3]["caption"] = "two red gadget 2"
    answers[4] |= {"cosine": 0.17}
    answers[5] |= {"cosine": 0.18}
    answers.pop()
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    words = (f"--records={out / 'objects.jsonl'}", f"--captions={tmp_path / 'answers.jsonl'}")
    assert run_program("captions", *words, "--test_count=10", f"--out={out}") == 0
    report = json.loads((out / "report.json").read_text())
    assert report == {
        "captions": 112,
        "dropped_none": 1,
        "dropped_without_name": 1,
        "dropped_too_long": 1,
        "dropped_low_cosine": 1,
        "kept_without_cosine": 111,
        "objects_without_answer": 1,
        "objects_dropped": 5,
        "objects": 112,
        "images": 38,
        "images_dropped": 1,
        "images_train": 28,
        "images_test": 10,
    }
    train, test = ([*read_images(out / f"{part}.jsonl")] for part in ("train", "test"))
    assert {one.image_id for one in train} | {one.image_id for one in test} == {*range(2, 40)}
    [second] = [one for one in (*train, *test) if one.image_id == 2]
    assert [one.captions for one in second.objects] == [("two red gadget 2",), ("a thing 0",)]
    assert second.nonexhaustive_class_ids == (3,)  # the caption went, the thing is still there
    per_class = collections.Counter(one.class_id for image in test for one in image.objects)
    assert all(abs(per_class[kind] - 112 / 4 * 10 / 38) < 2 for kind in range(4))


def run_program(*words: str) -> int:
    return common.main(import_moinst.PROGRAM, import_moinst.run, words)


def test_program_faults_are_one_line(tmp_path, capsys):
    out = f"--out={tmp_path / 'out'}"
    for words, said in (
        (("lvis", "--lvis=gone.json", out), "gone.json: expected a readable file"),
        (("published", "--train=gone.json", out), "gone.json: expected a readable file"),
        (
            ("captions", "--records=gone/a.jsonl", "--captions=b", out),
            "gone/classes.json: expected",
        ),
    ):
        assert run_program(*words) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    for words, said in ((("lvis", out), "--lvis"), (("lvis", "--train=y", out), "no such flag")):
        assert run_program(*words) == 2
        assert said in capsys.readouterr().err


def test_answers_of_another_build_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"image_id": 5, "object_id": 8, "caption": "a dog"}\n')
    with pytest.raises(DataError, match="image 5, object 8: the records have no such object"):
        captions.add_captions([IMAGE], CLASSES, captions.read_answers(path))
    path.write_text('{"image_id": 5, "object_id": 8, "captoin": "a dog"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: unknown key 'captoin'"):
        captions.read_answers(path)


def test_the_split_gives_every_class_its_share():
    rare = {1: 30, 2: 60, 3: 300}
    kinds = [k for k, count in rare.items() for _ in range(count)]
    images = [
        MoinstImage(
            image_id=number,
            file="x",
            objects=tuple(
                MoinstObject(name="x", class_id=c, source_category_id=c, object_id=c)
                for c in (kind, 0)
            ),
        )
        for number, kind in enumerate(kinds)
    ]
    train, test = stratified_split(images, 39)
    counts = collections.Counter(image.objects[0].class_id for image in test)
    assert counts == {1: 3, 2: 6, 3: 30}
    assert sorted((*train, *test), key=lambda one: one.image_id) == images
    assert stratified_split(images[::-1], 39)[1] == test[::-1]
    assert stratified_split(images, 39, seed=1)[1] != test
    with pytest.raises(ConfigError, match="fewer than the 390 images"):
        stratified_split(images, 390)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": None}, "lists 'images', 'annotations' and 'categories'"),
        ({"annotations": [{"id": 1, "category_id": 10}]}, r"annotations\[0\]: expected the key"),
        ({"annotations": []}, "at least two classes left, found none"),
    ],
)
def test_lvis_files_that_are_refused(change, message):
    with pytest.raises(PerceptionError, match=message):
        lvis.rebuild(lvis_content(3) | change, lvis.RebuildConfig())
