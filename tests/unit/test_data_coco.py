"""Files like COCO's as people have them: turned photos, odd ids and names, captioned boxes."""

from __future__ import annotations

import json
import pathlib
import pickle

import numpy as np
import PIL.Image
import pytest

from perception_jax.data import images
from perception_jax.data.sources import open_source
from perception_jax.data.sources.coco import CocoSource
from perception_jax.data.sources.tfds import FeatureMap
from perception_jax.errors import DataError

RED = (255, 0, 0)


def stored(folder: pathlib.Path, orientation: int, kind: str = "PNG") -> pathlib.Path:
    """A file of 60×40 stored pixels with a red part at xyxy (45, 5, 55, 15)."""
    pixels = np.full((40, 60, 3), 255, np.uint8)
    pixels[5:15, 45:55] = RED
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    path = folder / f"p.{kind.lower()}"
    PIL.Image.fromarray(pixels).save(path, kind, exif=exif)
    return path


def files(folder: pathlib.Path, image: str, size: tuple[int, int], box: list) -> list:
    """The same box in each format that has sizes."""
    (x1, y1, x2, y2), (width, height) = box, size
    sides, xywh = {"width": width, "height": height}, [x1, y1, x2 - x1, y2 - y1]
    coco = {
        "images": [{"id": 1, "file_name": image, **sides}],
        "categories": [{"id": 1, "name": "red"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": xywh}],
    }
    line = {"image": image, **sides, "objects": [{"name": "red", "box": box}]}
    moinst = {
        "image_id": 1,
        "file": image,
        **sides,
        "objects": [{"class": "red", "class_id": 0, "bbox": xywh}],
    }
    paths = []
    for name, content in (("a.json", coco), ("a.jsonl", line), ("b.jsonl", moinst)):
        paths.append(folder / name)
        paths[-1].write_text(json.dumps(content))
    return paths


def red_share(record) -> float:
    x1, y1, x2, y2 = (round(side) for side in record.objects[0].box)
    inside = images.decode(record.image)[y1:y2, x1:x2].reshape(-1, 3)
    return float((inside == RED).all(-1).mean())


@pytest.mark.parametrize(
    ("orientation", "kind"), [*((k, "PNG") for k in range(5, 9)), (5, "TIFF"), (6, "TIFF")]
)
def test_boxes_of_stored_pixels_are_turned_with_the_picture(tmp_path, orientation, kind):
    image = stored(tmp_path, orientation, kind)
    for path in files(tmp_path, image.name, (60, 40), [45, 5, 55, 15]):
        record = open_source(path)[0]
        assert red_share(record) == 1.0, path.name
        assert record.size == (40, 60)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_boxes_of_tfds_are_those_of_stored_pixels(tmp_path, orientation):
    image = stored(tmp_path, orientation).read_bytes()
    example = {"image": image, "box": [[5 / 40, 45 / 60, 15 / 40, 55 / 60]], "label": [0]}
    made = FeatureMap(boxes="box", labels="label", label_names=("red",))(example, 0)
    assert red_share(made) == 1.0


def test_boxes_of_the_picture_as_shown_stay(tmp_path, caplog):
    image = stored(tmp_path, 6)
    for path in files(tmp_path, image.name, (40, 60), [25, 45, 35, 55]):
        assert red_share(open_source(path)[0]) == 1.0
    assert "orientation" not in caplog.text
    # A size that is the same either way says nothing: taken as shown, and said once.
    image = stored(tmp_path, 3)
    for path in files(tmp_path, image.name, (60, 40), [5, 25, 15, 35]):
        source = open_source(path)
        assert red_share(source[0]) == red_share(source[0]) == 1.0
    assert caplog.text.count("EXIF orientation 3") == 3


def test_boxes_of_an_image_that_was_resized_are_refused(tmp_path):
    image = stored(tmp_path, 1)
    for path in files(tmp_path, image.name, (600, 400), [450, 50, 550, 150]):
        with pytest.raises(DataError, match=r"60×40 pixels, found 600×400") as caught:
            open_source(path)[0]
        assert str(path) in str(caught.value)
    # Captions do not depend on the size.
    coco = json.loads((tmp_path / "a.json").read_text())
    coco["annotations"] = [{"id": 1, "image_id": 1, "caption": "a square"}]
    (tmp_path / "a.json").write_text(json.dumps(coco))
    assert open_source(tmp_path / "a.json")[0].captions == ("a square",)


def content() -> dict:
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [{"id": 7, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 10]}],
        "categories": [{"id": 1, "name": "traffic light"}, {"id": 2, "name": "dog"}],
    }


def source(folder: pathlib.Path, coco: dict) -> CocoSource:
    PIL.Image.new("RGB", (40, 30)).save(folder / "a.png")
    (folder / "a.json").write_text(json.dumps(coco))
    made = open_source(folder / "a.json")
    for index in range(len(made)):
        assert pickle.loads(pickle.dumps(made))[index] == made[index]
    return made


def annotated(**changes) -> dict:
    coco = content()
    coco["annotations"][0] |= changes
    return coco


@pytest.mark.parametrize("name", ["a.png", "x/a.png", ".\\a.png", "C:\\data\\a.png"])
def test_file_names_with_folders_of_either_kind(tmp_path, name):
    coco = content()
    coco["images"][0]["file_name"] = name
    assert source(tmp_path, coco)[0].image.samefile(tmp_path / "a.png")


@pytest.mark.parametrize("own_id", [0, -3, 2**62, "0b7c-77", None])
def test_ids_of_annotations(tmp_path, own_id):
    assert source(tmp_path, annotated(id=own_id))[0].objects[0].object_id == own_id
    mixed = annotated(id=own_id)
    mixed["annotations"].append({**content()["annotations"][0], "id": "x"})
    assert [one.object_id for one in source(tmp_path, mixed)[0].objects] == [own_id, "x"]
    del mixed["annotations"][0]["id"]
    assert source(tmp_path, mixed)[0].objects[0].object_id is None


@pytest.mark.parametrize("key", ["id", "category_id", "image_id", "area", "iscrowd", "caption"])
@pytest.mark.parametrize(
    "value", [7.9, True, 10**20, [1], {}, float("nan"), float("inf"), "\ud800"]
)
def test_a_bad_value_of_any_field_names_its_annotation(tmp_path, key, value):
    if (key, value) in (("area", 7.9), ("area", 10**10), ("iscrowd", True)):
        return
    with pytest.raises(DataError, match=rf"a\.json: annotations\[0\]: {key}: expected"):
        source(tmp_path, annotated(**{key: value}))


def test_boxes_of_another_form_are_not_read_as_xywh(tmp_path):
    expected = source(tmp_path, content())[0].objects[0].box
    assert source(tmp_path, annotated(bbox_mode=1))[0].objects[0].box == expected
    for mode in (0, "XYXY_ABS"):
        with pytest.raises(DataError, match=rf"annotations\[0\]: bbox_mode: expected 1.*{mode}"):
            source(tmp_path, annotated(bbox_mode=mode))


def test_images_with_names_for_ids(tmp_path):
    coco = content()
    coco["images"] = [{**coco["images"][0], "id": name} for name in ("kite/1", "1")]
    coco["annotations"][0] |= {"image_id": "1"}
    made = source(tmp_path, coco)
    assert [record.id for record in made] == ["kite/1", "1"]
    assert [len(record.objects) for record in made] == [0, 1]
    assert made[1].image_id == "1"
    coco["images"][0]["id"] = 1
    with pytest.raises(DataError, match="unique ids"):
        source(tmp_path, coco)
    coco["images"].pop()
    with pytest.raises(DataError, match=r"annotations\[0\]: image_id: .*found '1'"):
        source(tmp_path, coco)


def test_captioned_boxes_keep_both(tmp_path):
    """Visual Genome and RefCOCO-g; MDETR's captions stand in "images"."""
    coco = content()
    coco["images"][0] |= {"caption": " a street ", "captions": ["at night", " "]}
    box = coco["annotations"][0]
    coco["annotations"] = [
        box | {"caption": " the left light", "area": 55.5},
        box | {"caption": "the right light", "bbox": [20, 2, 10, 10], "category_id": 2},
        {"id": 9, "image_id": 1, "caption": "two lights"},
        box | {"caption": None},
    ]
    record = source(tmp_path, coco)[0]
    assert record.captions == ("a street", "at night", "two lights")
    assert [(one.name, one.caption, one.area, one.box[0]) for one in record.objects] == [
        ("traffic light", "the left light", 55.5, 1.0),
        ("dog", "the right light", None, 20.0),
        ("traffic light", "", None, 1.0),
    ]
    coco["annotations"][0] = {"id": 1, "image_id": 1, "segmentation": []}
    with pytest.raises(DataError, match=r"annotations\[0\]: expected the key 'bbox' or 'caption'"):
        source(tmp_path, coco)


def test_captioned_regions_need_no_classes(tmp_path):
    coco = annotated(caption="a light")
    del coco["categories"], coco["annotations"][0]["category_id"]
    [one] = source(tmp_path, coco)[0].objects
    assert (one.name, one.raw_name, one.category_id, one.caption) == ("", "", None, "a light")
    del coco["annotations"][0]["caption"]
    with pytest.raises(DataError, match=r"annotations\[0\]: expected the key 'category_id'"):
        source(tmp_path, coco)


def test_classes_keep_their_names(tmp_path, caplog):
    """ODinW's boggleBoards has "Q" and "q", its ChessPieces a blank one."""
    coco = content()
    raw = ["Q", "q", "  ", "Fire_hydrant", "Fire_hydrant"]
    coco["categories"] = [{"id": k, "name": name} for k, name in enumerate(raw)]
    coco["annotations"] = [{**coco["annotations"][0], "category_id": k} for k in range(len(raw))]
    found = source(tmp_path, coco)[0].objects
    assert [one.raw_name for one in found] == raw
    shown = ["Q", "q", "category 2", "fire hydrant", "fire hydrant"]
    assert [one.name for one in found] == shown
    assert "several have one name and are one class by it: 'fire hydrant'" in caplog.text


@pytest.mark.parametrize("table", ["images", "annotations", "categories"])
def test_a_table_that_is_none_is_named(tmp_path, table):
    for broken in ({"a": 1}, None, "x", 3):
        with pytest.raises(DataError, match=r"a\.json: "):
            source(tmp_path, {**content(), table: broken})
    for broken in (None, 3, "x", [], [[[]]]):
        coco = content()
        coco[table][1:] = [broken]
        with pytest.raises(DataError, match=rf"a\.json: {table}\[1\]: expected an object"):
            source(tmp_path, coco)


def test_two_categories_with_one_id_are_refused(tmp_path):
    coco = content()
    coco["categories"][1]["id"] = 1
    message = r"categories\[1\]: id: .* found 1, the id of categories\[0\] \('traffic light'\)"
    with pytest.raises(DataError, match=message):
        source(tmp_path, coco)
