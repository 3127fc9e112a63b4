"""Planned batches: bit by bit those of before, whole groups, redrawn records, one path."""

from __future__ import annotations

import collections
import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest

from launch import data_page
from perception_jax.data import images
from perception_jax.data.planned import BatchPlan, PlannedData
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import ObjectAnnotation, Record
from perception_jax.data.scenes import objects as scenes
from perception_jax.data.sources import open_source
from perception_jax.data.sources.combine import split
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.errors import ConfigError, DataError
from perception_jax.systems.give.sampler import GroupConfig
from perception_jax.systems.give.training_data import ObjectRows, TrainingData

DIGESTS = {
    "scenes": """
        1a860be3020af0fb 622b73445480a649 2b61c7a377453bb3 3fe3d61b2515929b d32f5687e1bb643a
        c07252532f951761 76faf93d5aaf51e1 6fc078c26d63c9f1 b89117c7a455e653 4ff552eea5dd05cf
    """,
    "plus": """
        8a7bf069cda0483b 23c7446efd678d0c 5f81e5a492c738f7 6d487fe7395198c0 45f9e6aad311f126
        e13c08e3edd5b189 c002c2beca710c8b 49dc74075b7486c1 d00943d122b3c50b 63bdbcfd45e411e3
    """,
    "lines": """
        a2644372772f1785 14222bb8d4e8743e e18ff4457d3f113c c0e088959e858c0b cfe3819653acf439
        b753bfdeeca343ee bccd308d8b583d47 c9cb03ca589f656e bef71907f4e13918 4e489796e2817189
    """,
    "moinst": """
        ee202228bed4368e a42dddd54c45c6fa ad7a38499039c8c3 6e4fc2a701d64ae0 ede83109a39dd3f2
        fc5a55fd7d0f0a87 fe0a02f3c6e9a710 f70fb30c7a215943 f1d7987994af8210 9ff1eaf16e0c1482
    """,
}
"""Of the first ten batches of each case, made by the code before there was a planned loader (its
arrays under the names of today)."""


# --- The batches of GiVE's kinds of data ---------------------------------------------------------


def scene_data(folder: pathlib.Path, *, plus: bool = False, **options) -> TrainingData:
    """As configs/give/scenes.py:runlocal, with :plus if asked."""
    del folder
    shown = scenes.ObjectScenesConfig(
        canvas=72, objects=(2, 3), size=(0.3, 0.7), names=scenes.names(20), unnamed=plus
    )
    return TrainingData(
        scenes.training_scenes(shown, seed=0, length=40),
        GroupConfig(groups=4, images=2),
        processor=ImageProcessor(size=72),
        tokenizer=ClipTokenizer.shipped(1024, 32),
        altered=plus,
        **options,
    )


def line_data(folder: pathlib.Path, **options) -> TrainingData:
    """As configs/give/forkme.py: one object a line, some boxes, instructions, altered captions."""
    rng, lines = np.random.default_rng(3), []
    for k in range(30):
        width, height = rng.integers(20, 50, 2).tolist()
        _picture(rng, width, height).save(folder / f"{k}.png")
        for c in rng.choice(6, rng.integers(1, 4), replace=False).tolist():
            line = {
                "image": f"{k}.png",
                "class": f"Thing_{c}",
                "caption": f"a red thing {c} in {k}",
            }
            if c % 2:
                line["box"] = [1, 2, width - c, height - c]
            if c == 3:
                line["instruction"] = f"the one on the left of {k}"
            lines.append(line)
    path = _write(folder / "objects.jsonl", lines)
    return TrainingData(
        split(open_source(path, kind="objects"), every=10)[0],
        GroupConfig(groups=4, images=4, seed=1),
        processor=ImageProcessor(size=24, mode="llava_pad"),
        tokenizer=ClipTokenizer.shipped(600, 16),
        altered=True,
        **options,
    )


def moinst_data(folder: pathlib.Path, **options) -> TrainingData:
    """As configs/data/moinst.py: several captions, verified absent classes, a crop."""
    rng, lines = np.random.default_rng(4), []
    for k in range(40):
        width, height = rng.integers(24, 70, 2).tolist()
        _picture(rng, width, height).save(folder / f"{k}.png")
        kinds = rng.choice(8, 5, replace=False).tolist()
        objects = [
            {
                "class": f"thing_{c}",
                "class_id": c,
                "object_id": 9 * k + c,
                "captions": [f"t{c} {k} {n}" for n in range(c % 3)],
                "bbox": [c, c, 8 + c, 10],
            }
            for c in kinds[:2]
        ]
        line = {"image_id": k, "file": f"{k}.png", "width": width, "height": height}
        more = {"neg_class_ids": kinds[2:4], "nonexhaustive_class_ids": kinds[4:]} if k % 3 else {}
        lines.append({**line, "objects": objects, **more})
    path = _write(folder / "train.jsonl", lines)
    classes = [{"class_id": c, "source_category_id": c, "class": f"thing_{c}"} for c in range(8)]
    (folder / "classes.json").write_text(json.dumps(classes))
    return TrainingData(
        open_source(path),
        GroupConfig(groups=3, images=4, seed=5),
        processor=ImageProcessor(size=24),
        tokenizer=ClipTokenizer.shipped(600, 16),
        template="a photo of a {}.",
        **options,
    )


CASES: dict[str, Callable[..., TrainingData]] = {
    "scenes": scene_data,
    "plus": functools.partial(scene_data, plus=True),
    "lines": line_data,
    "moinst": moinst_data,
}


def digests(batches) -> list[str]:
    """One digest per batch, of the names, dtypes, shapes and bytes of its arrays but "id"."""
    return [_digest(batch) for batch in batches]


def take(loader, count: int, state=None) -> list[dict[str, np.ndarray]]:
    """The next batches of a loader, from the start or from a saved place."""
    iterator = iter(loader)
    if state is not None:
        iterator.set_state(state)
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def _digest(batch: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for name in sorted(batch.keys() - {"id"}):
        value = np.ascontiguousarray(batch[name])
        found.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    return found.hexdigest()[:16]


def _picture(rng: np.random.Generator, width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def _write(path: pathlib.Path, lines: list[dict]) -> pathlib.Path:
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("hold", [False, True], ids=["read", "in memory"])
@pytest.mark.parametrize("name", CASES)
def test_batches_are_bit_by_bit_those_of_before(name, hold, tmp_path):
    """From the start, on two hosts, and resumed in the middle from positions as old runs have."""
    data, expected = CASES[name](tmp_path, hold=hold), DIGESTS[name].split()
    whole = take(data.loader(), 10)
    assert digests(whole) == expected
    halves = [take(data.loader(host=(k, 2)), 3) for k in range(2)]
    for batch, *parts in zip(whole[:3], *halves, strict=True):
        for key, values in batch.items():
            for k, part in enumerate(parts):
                np.testing.assert_array_equal(part[key], values[k::2], err_msg=key)
    rows, seed = len(whole[0]["label"]), data.planner.seed
    state = {"position": 4 * rows, "hosts": 1, "records": 1_000_000 * rows, "seed": seed}
    # Old runs also skipped single rows: a batch is never taken up in its middle.
    uneven = {**state, "position": 4 * rows + 3, "shuffle": 0}
    for place in ({**state, "shuffle": 0}, uneven, {"next_index": 4}):
        assert digests(take(data.loader(), 3, place)) == expected[4:7]
    iterator = iter(data.loader())
    for _ in range(4):
        next(iterator)
    assert iterator.get_state() == {**state, "shuffle": 0}
    iterator.close()


def test_data_in_memory_make_whole_batches(tmp_path, monkeypatch):
    """Once per batch and host; row by row only where a record cannot be used."""
    made, single = collections.Counter(), ObjectRows.__call__
    whole = ObjectRows.batch
    monkeypatch.setattr(
        ObjectRows,
        "batch",
        lambda self, read, plan: made.update([len(read)]) or whole(self, read, plan),
    )
    monkeypatch.setattr(ObjectRows, "__call__", lambda *args: made.update(["row"]) or single(*args))
    data = scene_data(tmp_path, hold=True)
    take(data.loader(), 10)
    assert made.keys() == {data.planner.batch_size}
    take(data.loader(host=(1, 2)), 10)
    assert made.keys() == {data.planner.batch_size, data.planner.batch_size // 2}
    take(training(Numbers(frozenset({2})), hold=True, max_bad_fraction=0.5).loader(), 20)
    assert made["row"] > 0


def test_workers_make_the_same_batches(tmp_path):
    data = moinst_data(tmp_path)
    assert digests(take(data.loader(num_workers=2), 3)) == DIGESTS["moinst"].split()[:3]


def test_check_data_draws_the_boxes_of_give(tmp_path):
    """Half of the objects have one; only those are drawn."""
    data, drawn = line_data(tmp_path), collections.Counter()
    for k in range(32):
        record, example = data.examples(0)[k]
        boxed = record.objects[record.instructions[0].target].box is not None
        [(picture, _)] = data_page._draw_example(example)
        [(plain, _)] = data_page._draw_example({"image": example["image"]})
        assert np.array_equal(picture, plain) != boxed
        drawn[boxed] += 1
    assert min(drawn[True], drawn[False]) > 5


# --- Records that cannot be used -----------------------------------------------------------------


class Numbers:
    """Records 0 to 39, some of which cannot be read; class c has the records c, c + 4, …"""

    def __init__(self, broken: frozenset[int] = frozenset()):
        self.broken, self.reads = broken, collections.Counter()

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Record:
        self.reads[index] += 1
        image = np.full((4, 4, 3), index, np.uint8)
        names = [f"c{index % 4}", *["d"] * (index % 8 < 4)]
        objects = (ObjectAnnotation(name=n, box=None, captions=(f"{n} {index}",)) for n in names)
        return Record(
            id=f"number {index}",
            images=(b"broken" if index in self.broken else image,),
            objects=tuple(objects),
            absent=("e",),
        )


def training(source: Numbers, *, groups: int = 2, **options) -> TrainingData:
    return TrainingData(
        source,
        GroupConfig(groups=groups, images=3, seed=2),
        processor=ImageProcessor(size=4),
        tokenizer=ClipTokenizer.shipped(600, 8),
        **options,
    )


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], row: int) -> bool:
    return all(np.array_equal(one[key][row], other[key][row]) for key in one)


@pytest.mark.parametrize("hold", [False, True], ids=["read", "in memory"])
def test_a_bad_record_is_redrawn_from_its_own_group(hold, caplog):
    """All other rows stay as they are, at their places; each is named once."""
    broken = frozenset({1, 2, 14, 20, 24, 33})
    options = {"hold": hold, "max_bad_fraction": 0.5}
    sound = take(training(Numbers(), hold=hold).loader(), 40)
    data = training(Numbers(broken), **options)
    found = take(data.loader(), 40)
    redrawn = 0
    for number, (one, other) in enumerate(zip(sound, found, strict=True)):
        for row in range(12):
            bad = int(one["image_index"][row]) in broken
            assert same(one, other, row) != bad
            redrawn += bad
            assert int(other["image_index"][row]) not in broken
        for batch in (one, other):
            groups = batch["label"].reshape(2, 3, 2)[:, :, 0]
            assert (groups == groups[:, :1]).all(), number
    assert redrawn > 30
    assert caplog.text.count("skipped record 'number ") == len(broken)
    halves = [take(training(Numbers(broken), **options).loader(host=(k, 2)), 5) for k in range(2)]
    for batch, *parts in zip(found[:5], *halves, strict=True):
        for k, part in enumerate(parts):
            np.testing.assert_array_equal(part["image_index"], batch["image_index"][k::2])


def test_a_group_without_any_usable_record_becomes_one_of_another_class():
    broken = frozenset(range(1, 40, 4))  # all of class c1
    data = training(Numbers(broken), max_bad_fraction=0.5)
    kind, replaced = data.index.names.index("c1"), 0
    for number, batch in enumerate(take(data.loader(), 30)):
        planned = data.planner.plan(*divmod(number, data.planner.batches_per_epoch))["label"]
        first = batch["label"].reshape(2, 3, 2)[:, :, 0]
        assert (first == first[:, :1]).all()
        assert kind not in first
        assert len(set(first[:, 0].tolist())) == 2
        replaced += kind in planned.reshape(2, 6)[:, 0]
    assert replaced > 5


def test_too_many_bad_records_stop_and_are_named():
    with pytest.raises(DataError, match=r"records could not be used.*max_bad_fraction"):
        take(training(Numbers(frozenset(range(20)))).loader(), 200)
    data = training(Numbers(frozenset(range(40))), groups=1, max_bad_fraction=1.0)
    with pytest.raises(DataError, match=r"record.* could"):
        take(data.loader(), 1)
    with pytest.raises(DataError, match="not an image"):
        data[0]


def test_known_bad_and_kept_records_are_read_once():
    source = Numbers(frozenset({2, 14}))
    data = training(source, hold=True, max_bad_fraction=0.5)
    source.reads.clear()
    take(data.loader(), 60)
    assert set(source.reads.values()) <= {1, 2}  # two threads may ask for one at the same time
    source = Numbers()
    data = training(source)
    source.reads.clear()
    take(data.loader(), 60)
    assert max(source.reads.values()) > 2


# --- Another planner -----------------------------------------------------------------------------


class Modalities:
    """Batches of images or of texts alone, in turns; each kind has its own shape."""

    seed, batch_size, batches_per_epoch = 3, 4, 10

    def plan(self, epoch: int, step: int) -> BatchPlan:
        record = np.random.default_rng([epoch, step]).integers(10, size=4) * 2 + step % 2
        shape = ("text", "image")[step % 2]
        group = np.full(4, step % 2)
        return BatchPlan(record=record, group=group, columns={"step": group + step}, shape=shape)

    def redraws(self, epoch: int, step: int, place: int):
        return iter(())


class Drawn:
    """Noise of the shape's size, by the row's seed."""

    def read(self, record, shape):
        return images.decode(record.image) if shape == "image" else None

    def __call__(self, read, row):
        noise = np.random.default_rng(row.seed).random(2 if row.shape == "text" else 5)
        return {"noise": noise, "step": np.int32(row.values["step"])}

    def described(self, record, row):
        return record


class Failing(Drawn):
    """Raises what is no fault of the data."""

    def __call__(self, read, row):
        raise ValueError("a mistake")


def mixed(broken: bool = False) -> list[Record]:
    image = b"broken" if broken else np.zeros((2, 2, 3), np.uint8)
    return [Record(id=str(k), images=(image,) * (k % 2)) for k in range(20)]


def test_shapes_and_seeds_come_from_the_plan():
    data = PlannedData(mixed(), Modalities(), Drawn())
    batches = take(data.loader(batch_size=4), 12)
    assert [batch["noise"].shape for batch in batches] == [(4, 2), (4, 5)] * 6
    assert all(len({int(name) % 2 for name in batch["id"]}) == 1 for batch in batches)
    noise = np.concatenate([batch["noise"].ravel() for batch in batches])
    assert len(np.unique(noise)) == len(noise)
    again = take(data.loader(num_workers=2), 12)
    for one, other in zip(batches, again, strict=True):
        np.testing.assert_array_equal(one["noise"], other["noise"])
    data = PlannedData(mixed(), Modalities(), Failing())
    with pytest.raises(DataError, match=r"planned row \d+, record number \d+(?s:.*)a mistake"):
        take(data.loader(), 1)
    with pytest.raises(ConfigError, match="expected 4, the rows of a planned batch, found 6"):
        data.loader(batch_size=6)


def test_a_place_that_no_record_may_take_is_an_error():
    data = PlannedData(mixed(broken=True), Modalities(), Drawn(), max_bad_fraction=1.0)
    with pytest.raises(DataError, match=r"none of 1 records that may take one place .*not an im"):
        take(data.loader(), 12)
