"""GiVE's training rows: what an index keeps, how batches are drawn, and where they go."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import pathlib
import pickle

import numpy as np
import PIL.Image
import pytest

from perception_jax.data.instructions import FORMS, instruction_for
from perception_jax.data.moinst.source import MoinstSource
from perception_jax.data.object_index import index_objects
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import ObjectAnnotation, ObjectInstruction, Record, Source
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource
from perception_jax.data.sources.coco import CocoSource
from perception_jax.data.sources.combine import InMemory
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.errors import ConfigError, DataError
from perception_jax.systems.give.sampler import BatchPlanner, GroupConfig
from perception_jax.systems.give.training_data import TrainingData

GREY = np.zeros((4, 6, 3), np.uint8)
WHOLE = (0.0, 0.0, 6.0, 4.0)


def record(number: int, *names: str, **more) -> Record:
    objects = tuple(
        ObjectAnnotation(name=name, box=WHOLE, captions=(f"a {name} in {number}",))
        for name in names
    )
    return Record(id=str(number), images=(GREY,), objects=objects, **more)


def random_records(count: int, classes: int, seed: int = 0) -> list[Record]:
    """One to four classes each, low numbers often; some with verified and some unsure classes."""
    rng = np.random.default_rng(seed)
    share = 1.0 / np.arange(1, classes + 1)
    made = []
    for number in range(count):
        kinds = rng.choice(classes, rng.integers(1, 5), replace=False, p=share / share.sum())
        others = np.setdiff1d(np.arange(classes), kinds)
        negative, unsure = np.split(rng.permutation(others)[:6], 2)
        # One is wrong, as labels can be: it is there.
        absent = tuple(f"c{k}" for k in (*negative, kinds[0])) if number % 2 else ()
        unsure = tuple(f"c{k}" for k in unsure) if number % 3 else ()
        made.append(record(number, *(f"c{k}" for k in kinds), absent=absent, not_exhaustive=unsure))
    return made


def plans(records: Source | list[Record], config: GroupConfig, epoch: int, count: int, **options):
    planner = BatchPlanner(index_objects(records, **options), config)
    return planner.index, [planner.plan(epoch, step) for step in range(count)]


# --- Batches ------------------------------------------------------------------------------------


def test_a_batch_is_groups_of_one_class_with_a_second_object():
    records = random_records(300, 12)
    config = GroupConfig(groups=5, images=6)
    index, drawn = plans(records, config, 0, 20)
    classes = [{one.name for one in entry.objects} for entry in records]
    for plan in drawn:
        kind = plan["label"].reshape(5, 6, 2)
        image = plan.record.reshape(5, 6, 2)
        groups = kind[:, 0, 0]
        assert len(set(groups.tolist())) == 5
        assert (kind[:, :, 0] == groups[:, None]).all()
        for group in range(5):
            available = len(index.by_class.of(int(groups[group])))
            assert len(set(image[group, :, 0].tolist())) == min(6, available)
        for first, second, c, other in zip(
            *np.moveaxis(image.reshape(-1, 2), 1, 0),
            *np.moveaxis(kind.reshape(-1, 2), 1, 0),
            strict=True,
        ):
            if len(classes[first]) > 1:
                assert (first == second, c == other) == (True, False)
            else:
                assert (first == second, c == other) == (False, True)
        for row in range(config.batch_size):
            name = index.names[plan["label"][row]]
            one = records[plan.record[row]].objects[plan["object"][row]]
            assert (one.name, one.caption) == (name, index.captions[plan["caption_index"][row]])
            text = index.instructions.strings[plan["instruction_index"][row]]
            assert text in {instruction_for(name, form) for form in FORMS}


def test_second_images_of_lonely_objects_are_new_while_there_are_any():
    """Nobody has a second object: 4 + 4 of 8 images, all different; of 5, none beside itself."""
    config = GroupConfig(groups=1, images=4)
    for count in (8, 5, 2):
        _, drawn = plans([record(k, "cup", absent=("dog",)) for k in range(count)], config, 0, 10)
        for plan in drawn:
            pairs = plan.record.reshape(4, 2)
            assert len(set(plan.record.tolist())) == min(8, count)
            assert (pairs[:, 0] != pairs[:, 1]).all()


def test_classes_are_drawn_by_the_root_of_their_images():
    counts = [1, 4, 9, 16, 400]
    records = [record(n, f"c{k}", absent=("x",)) for n, k in enumerate(np.repeat(range(5), counts))]
    index, drawn = plans(records, GroupConfig(groups=1, images=1), 0, 4000)
    seen = collections.Counter(index.names[plan["label"][0]] for plan in drawn)
    for k, count in enumerate(counts):
        share = np.sqrt(count) / 30
        allowed = 4 * np.sqrt(share * (1 - share) / 4000)
        assert abs(seen[f"c{k}"] / 4000 - share) < allowed


def test_second_objects_and_captions_are_drawn_alike():
    entry = record(0, "a", "b", "c", "d")
    captions = ("one", "two"), ("three",), ("four",), ()
    objects = zip(entry.objects, captions, strict=True)
    objects = tuple(dataclasses.replace(one, captions=own) for one, own in objects)
    entry = dataclasses.replace(entry, objects=objects)
    _, drawn = plans([entry, record(1, "e")], GroupConfig(groups=4, images=1), 0, 900)
    seconds = collections.Counter()
    captions = collections.Counter()
    for plan in drawn:
        seconds.update(zip(plan["label"][::2].tolist(), plan["label"][1::2].tolist(), strict=True))
        captions.update(plan["caption_index"][plan["label"] == 0].tolist())
    assert set(seconds) == {*itertools.permutations(range(3), 2), (4, 4)}  # d has no caption
    for pair in itertools.permutations(range(3), 2):
        assert abs(seconds[pair] / 900 - 0.5) < 4 * np.sqrt(0.25 / 900)
    assert abs(captions[0] / (captions[0] + captions[1]) - 0.5) < 0.05


# --- Absent classes -----------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1])
def test_absent_classes_are_absent(epoch):
    """Verified ones where the image has any; never annotated, never unsure; each comes up."""
    records = random_records(200, 15)
    index, drawn = plans(records, GroupConfig(groups=8, images=8), epoch, 60)
    seen = collections.defaultdict(collections.Counter)
    for plan in drawn:
        for image, absent in zip(plan.record.tolist(), plan["absent_index"].tolist(), strict=True):
            seen[image][index.names[absent]] += 1
    every = {one.name for entry in records for one in entry.objects}
    assert len(every) == 15
    often = 0
    for image, found in seen.items():
        shown = {one.name for one in records[image].objects}
        unsure = set(records[image].not_exhaustive)
        allowed = (set(records[image].absent) or every) - shown - unsure
        assert set(found) <= allowed
        if records[image].absent and found.total() > 60:
            often += 1
            assert set(found) == allowed
    assert often > 10


def test_uniform_absent_classes_are_uniform():
    records = [record(0, "a"), *(record(k, "bcdefgh"[k % 7]) for k in range(1, 8))]
    index, drawn = plans(records, GroupConfig(groups=1, images=1), 0, 6000)
    seen = collections.Counter(
        index.names[plan["absent_index"][0]] for plan in drawn if plan.record[0] == 0
    )
    total = seen.total()
    assert set(seen) == set("bcdefgh")
    assert max(abs(n / total - 1 / 7) for n in seen.values()) < 4 * np.sqrt(6 / 49 / total)


def test_hard_absent_classes_are_those_seen_together_and_only_later():
    """Half of the images of "fork" have "knife" too; 40 other classes are never with it."""
    records = [record(k, "fork", *["knife"] * (k % 2)) for k in range(40)]
    records += [record(100 + k, f"c{k}") for k in range(40)]
    among_candidates = 1 - (40 / 41) ** 16
    for epoch, share in ((0, 1 / 41), (1, 0.5 * (among_candidates + 1 / 41))):
        index, drawn = plans(records, GroupConfig(groups=20, images=8), epoch, 200)
        kinds = [
            plan["absent_index"][(plan.record < 40) & (plan.record % 2 == 0)] for plan in drawn
        ]
        knives = np.concatenate(kinds) == index.names.index("knife")
        assert len(knives) > 500
        assert abs(knives.mean() - share) < 4 * np.sqrt(share * (1 - share) / len(knives))


def test_lvis_trains_on_class_names_and_verified_negatives(tmp_path):
    PIL.Image.fromarray(GREY).save(tmp_path / "a.png")
    names = ["bead_(jewelry)", "dog", "cat", "owl", "cup"]
    content = {
        "categories": [{"id": 5 - k, "name": name} for k, name in enumerate(names)],
        "images": [
            {"id": k, "file_name": "a.png", "width": 6, "height": 4, "neg_category_ids": [3, 2]}
            for k in range(4)
        ],
        "annotations": [
            {"id": 9 * k + c, "image_id": k, "category_id": c, "bbox": [0, 0, 6, 4]}
            for k in range(4)
            for c in (5, 4, 1)
        ],
    }
    content["images"][0]["not_exhaustive_category_ids"] = [2]
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    source = CocoSource(tmp_path / "lvis.json")
    index, drawn = plans(source, GroupConfig(groups=3, images=2), 1, 30, template="one {}.")
    assert index.names == ("cup", "dog", "bead (jewelry)", "cat", "owl")
    assert set(index.captions) == {"one cup.", "one dog.", "one bead."}
    for k, allowed in ((0, {"cat"}), (1, {"cat", "owl"})):
        absent = np.concatenate([plan["absent_index"][plan.record == k] for plan in drawn])
        assert {index.names[kind] for kind in absent} == allowed


def test_a_crowd_is_no_object_and_not_absent():
    crowd = dataclasses.replace(record(0, "a").objects[0], crowd=True)
    first = record(0, "b")
    records = [
        dataclasses.replace(first, objects=(crowd, *first.objects)),
        record(1, "a"),
        record(2, "c"),
    ]
    index, drawn = plans(records, GroupConfig(groups=3, images=2), 1, 20)
    assert [index.names[k] for k in index.pairs.of(0)] == ["b"]
    assert all(
        plan["object"][row] == 1 for plan in drawn for row in np.flatnonzero(plan.record == 0)
    )
    absent = np.concatenate([plan["absent_index"][plan.record == 0] for plan in drawn])
    assert {index.names[k] for k in absent} == {"c"}


def test_images_that_lack_no_class_are_left_out_and_counted():
    records = [record(0, "a", "b"), record(1, "a"), record(2, "b", not_exhaustive=("a",))]
    index = index_objects(records)
    assert (index.counts.never_absent, index.counts.pairs) == (3, 1)
    assert index.pair_images.tolist() == [1]


# --- What an index keeps ------------------------------------------------------------------------


def test_what_the_crop_cuts_away_is_neither_present_nor_absent():
    border = ObjectAnnotation(name="cup", box=(0.0, 0.0, 20.0, 50.0), captions=("a cup",))
    middle = ObjectAnnotation(name="dog", box=(60.0, 0.0, 90.0, 50.0), captions=("a dog",))
    unplaced = ObjectAnnotation(name="cat", box=None, captions=("a cat",))
    image = np.zeros((50, 150, 3), np.uint8)
    entry = Record(id="0", images=(image,), objects=(border, middle, unplaced))
    records = [entry, record(1, "cup"), record(2, "car")]
    crop = ImageProcessor(size=50)
    index, drawn = plans(records, GroupConfig(groups=2, images=2), 1, 40, processor=crop)
    assert index.counts.cropped == 1
    assert {index.names[k] for k in index.pairs.of(0)} == {"dog", "cat"}
    absent = np.concatenate([plan["absent_index"][plan.record == 0] for plan in drawn])
    assert {index.names[k] for k in absent} == {"car"}
    bars = dataclasses.replace(crop, mode="llava_pad")
    assert index_objects(records, processor=bars).counts.cropped == 0
    # What a record says of its size saves reading the file.
    unread = dataclasses.replace(entry, images=(pathlib.Path("gone"),), size=(150, 50))
    assert index_objects([unread, *records[1:]], processor=crop).counts.cropped == 1


def test_captions_templates_and_the_order_of_classes():
    named = [record(0, "b", "a"), record(1, "c")]
    plain = ObjectAnnotation(name="bead (jewelry)", box=None)
    bare = Record(id="2", images=(GREY,), objects=(plain,))
    index = index_objects([*named, bare])
    assert (index.names, index.counts.uncaptioned) == (("a", "b", "bead (jewelry)", "c"), 1)
    made = index_objects([*named, bare], template="a photo of a {}.")
    assert made.counts.uncaptioned == 0
    assert "a photo of a bead." in made.captions
    numbered = [
        dataclasses.replace(
            entry,
            objects=tuple(
                dataclasses.replace(one, category_id=-ord(one.name)) for one in entry.objects
            ),
        )
        for entry in named
    ]
    assert index_objects(numbered).names == index_objects(numbered[::-1]).names == ("c", "b", "a")
    with pytest.raises(DataError, match=r"found 0 objects.*1 without a caption"):
        index_objects([bare])


def test_own_instructions_are_used_as_they_stand():
    said = {"The red one!": 0, "a later one": 0, "a lie": None}
    own = tuple(ObjectInstruction(text=text, target=target) for text, target in said.items())
    records = [record(0, "a", "b", instructions=own), record(1, "b"), record(2, "c", "a")]
    index, drawn = plans(records, GroupConfig(groups=3, images=2), 1, 30)
    strings = np.array(index.instructions.strings)
    assert len(set(strings)) == len(strings) == 3 * len(FORMS) + 2
    for plan in drawn:
        texts, absent = (
            strings[plan["instruction_index"]],
            strings[plan["absent_instruction_index"]],
        )
        first = (plan.record == 0) & (plan["label"] == index.names.index("a"))
        assert ((texts == "The red one!") == first).all()
        assert not np.isin(absent, list(said)).any()
    without = index_objects(records, own_instructions=False)
    assert len(without.instructions.strings) == 3 * len(FORMS)


def test_nothing_with_left_or_right_in_it_is_mirrored():
    texts = ["on the Left.", "a right-hand glove", "a cleft", "bright", "plain"]
    records = [
        Record(
            id=str(k),
            images=(GREY,),
            objects=(ObjectAnnotation(name=f"c{k}", box=None, captions=(text,)),),
        )
        for k, text in enumerate(texts)
    ]
    own = (ObjectInstruction(text="the one on the right", target=0),)
    records.append(record(5, "c5", instructions=own))
    _, drawn = plans(records, GroupConfig(groups=6, images=1), 1, 400)
    flips = collections.defaultdict(list)
    for plan in drawn:
        for image, flip in zip(plan.record.tolist(), plan["flip"].tolist(), strict=True):
            flips[image].append(flip)
    shares = [np.mean(flips[k]) for k in range(6)]
    assert [shares[k] for k in (0, 1, 5)] == [0, 0, 0]
    assert all(abs(shares[k] - 0.5) < 0.08 for k in (2, 3, 4))


# --- Through the loader -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TrainingData:
    """Canonical records of 40 pictures in a folder, 6 classes, batches of 24 rows."""
    folder = tmp_path_factory.mktemp("moinst")
    rng = np.random.default_rng(0)
    lines = []
    for k in range(40):
        pixels = rng.integers(0, 256, (10, 12, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{k}.png")
        objects = [
            {
                "class": f"thing_{c}",
                "class_id": c,
                "object_id": 9 * k + c,
                "captions": [f"t{c} {k}"],
            }
            for c in sorted(rng.choice(6, 2, replace=False).tolist())
        ]
        lines.append({"image_id": k, "file": f"{k}.png", "objects": objects})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return TrainingData(
        MoinstSource(folder / "train.jsonl"),
        GroupConfig(groups=3, images=4, seed=5),
        processor=ImageProcessor(size=8),
        tokenizer=ClipTokenizer.shipped(600, 16),
    )


def take(loader, count: int, state=None) -> list[dict[str, np.ndarray]]:
    iterator = iter(loader)
    if state is not None:
        iterator.set_state(state)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def assert_equal(left, right) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_batches_are_the_plans_of_their_steps_and_epochs(data):
    """80 annotations in batches of 24: a new epoch after every four."""
    assert data.planner.batches_per_epoch == 4
    planner = BatchPlanner(data.index, GroupConfig(groups=3, images=4, seed=5))
    batches = take(data.loader(batch_size=24), 6)
    for number, batch in enumerate(batches):
        plan = planner.plan(*divmod(number, 4))
        numbers = {
            "image_index": plan.record,
            "label": plan["label"],
            "absent_index": plan["absent_index"],
            "caption_index": plan["caption_index"],
            "instruction_index": plan["instruction_index"],
            "absent_instruction_index": plan["absent_instruction_index"],
        }
        for name, values in numbers.items():
            assert batch[name].dtype == np.int32
            np.testing.assert_array_equal(batch[name], values)
        tokens = data.tokenizer([data.index.captions[k] for k in plan["caption_index"]])
        np.testing.assert_array_equal(batch["ids"], tokens.ids)
        np.testing.assert_array_equal(batch["id_mask"], tokens.mask)
        assert batch["image"].shape == (24, 8, 8, 3)
    assert not np.array_equal(batches[0]["image_index"], batches[4]["image_index"])
    unflipped, mirrored = {}, 0
    for number, batch in enumerate(batches):
        plan = planner.plan(*divmod(number, 4))
        for image, flip, pixels in zip(plan.record, plan["flip"], batch["image"], strict=True):
            upright = pixels[:, ::-1] if flip else pixels
            mirrored += bool(flip)
            np.testing.assert_array_equal(unflipped.setdefault(int(image), upright), upright)
    assert 40 < mirrored < 104


def test_hosts_and_workers_see_the_same_global_batches(data):
    whole = take(data.loader(host=(0, 1)), 5)
    halves = [take(data.loader(host=(k, 2)), 5) for k in range(2)]
    for number, batch in enumerate(whole):
        for name, values in batch.items():
            for k in range(2):
                np.testing.assert_array_equal(halves[k][number][name], values[k::2], err_msg=name)
    assert_equal(take(data.loader(host=(0, 1), num_workers=2), 3), whole[:3])


def test_resuming_in_the_middle_of_an_epoch(data):
    whole = take(data.loader(), 6)
    iterator = iter(data.loader())
    list(itertools.islice(iterator, 3))
    state = iterator.get_state()
    iterator.close()
    assert_equal(take(data.loader(), 3, state), whole[3:])
    one = take(data.loader(host=(1, 2)), 1, state)
    assert_equal(one, [{name: values[1::2] for name, values in whole[3].items()}])


def test_other_seeds_and_copies(data):
    copy = pickle.loads(pickle.dumps(data))
    for k in range(0, 300, 37):
        assert_equal([copy[k][1]], [data[k][1]])
    plan = data.planner.plan(0, 0)
    other = BatchPlanner(data.index, dataclasses.replace(data.planner.config, seed=6))
    assert (other.plan(0, 0).record != plan.record).any()
    entry, arrays = data[5]
    strings = data.index.instructions.strings
    assert entry.instructions == (
        ObjectInstruction(
            text=strings[plan["instruction_index"][5]], target=int(plan["object"][5])
        ),
        ObjectInstruction(text=strings[plan["absent_instruction_index"][5]], target=None),
    )
    assert (arrays["image_index"], entry.id) == (plan.record[5], str(plan.record[5]))
    with pytest.raises(IndexError):
        data[len(data)]


def test_scenes_are_training_data_too():
    """Their verified absent names are the only absent classes."""
    scenes = ScenesSource(SceneConfig(canvas=32, count=(2, 4)), seed=0, length=30)
    source = InMemory(scenes, keep=("objects", "absent"))
    data = TrainingData(
        source,
        GroupConfig(groups=6, images=2),
        processor=ImageProcessor(size=16),
        tokenizer=ClipTokenizer.shipped(600, 32),
    )
    for k in range(60):
        entry, arrays = data[k]
        shown = entry.objects[entry.instructions[0].target]
        assert shown.name == data.index.names[arrays["label"]]
        assert data.index.captions[arrays["caption_index"]] in shown.captions
        assert data.index.names[arrays["absent_index"]] in entry.absent


def test_sizes_that_do_not_fit(data):
    with pytest.raises(ConfigError, match="at most the 6 classes of the data, found 7"):
        BatchPlanner(data.index, GroupConfig(groups=7))
    with pytest.raises(ConfigError, match=r"expected 24, .*found 32"):
        data.loader(batch_size=32)
    with pytest.raises(ConfigError, match="at least 1 group"):
        GroupConfig(images=0)
