"""One rule for records that cannot be used, wherever they are read, and a bound on pixels."""

from __future__ import annotations

import io
import pathlib
import threading
import time

import numpy as np
import PIL.Image
import pytest

from configs.clip import scenes as clip_config
from configs.give import forkme
from perception_jax.data import images, pixel_budget
from perception_jax.data.loader import make_loader
from perception_jax.data.object_index import index_objects
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import ObjectAnnotation, Record
from perception_jax.data.skipping import usable
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.errors import ConfigError, DataError
from perception_jax.systems.contrastive import program
from perception_jax.systems.give.evaluation.benchmark import evaluation_of
from perception_jax.systems.give.sampler import GroupConfig
from perception_jax.systems.give.training_data import TrainingData

NAMES = ("dog", "cat", "cup", "fox")
PROCESSOR = ImageProcessor(size=8)
TOKENIZER = ClipTokenizer.shipped(600, 12)


class Things:
    """Images of one thing each; of some the record cannot be made, of others the image is bad."""

    def __init__(self, count: int = 24, *, unread: tuple = (), broken: tuple = ()):
        self.count, self.unread, self.broken = count, unread, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.unread:
            raise DataError(f"line {index} is wrong")
        name = NAMES[index % len(NAMES)]
        image = np.full((8, 8, 3), index, np.uint8)
        return Record(
            id=f"thing {index}",
            images=(b"no image" if index in self.broken else image,),
            captions=(f"a {name}",),
            objects=(
                ObjectAnnotation(name=name, box=(0.0, 0.0, 8.0, 8.0), captions=(f"a {name}",)),
            ),
        )


def numbers(source) -> list[str]:
    return [source[k].id.removeprefix("thing ") for k in range(len(source))]


def test_usable_records_are_those_that_can_be_decoded(caplog):
    sound = Things()
    assert usable(sound) is sound
    source = Things(unread=(3,), broken=(5,))
    with pytest.raises(DataError, match=r"2 of 24 records .* raise max_bad_fraction"):
        usable(source)
    caplog.clear()
    found = usable(source, max_bad_fraction=0.1)
    assert numbers(found) == [str(k) for k in range(24) if k not in (3, 5)]
    assert "skipped record 'number 3': line 3 is wrong" in caplog.text
    assert "skipped record 'thing 5': encoded image (8 bytes) of record 'thing 5'" in caplog.text
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="max_bad_fraction: expected a share"):
            usable(source, max_bad_fraction=share)


def training(source, *, hold: bool, **options) -> TrainingData:
    config = GroupConfig(groups=2, images=2)
    return TrainingData(
        source, config, processor=PROCESSOR, tokenizer=TOKENIZER, hold=hold, **options
    )


@pytest.mark.parametrize("hold", [False, True])
def test_give_skips_what_it_cannot_read_in_training(hold, caplog):
    source = Things(unread=(3,), broken=(5,))
    data = training(source, hold=hold, max_bad_fraction=0.2)
    batches = iter(data.loader())
    seen = {int(one) for _ in range(12) for one in next(batches)["image"][:, 0, 0, 0]}
    batches.close()
    assert seen == {k for k in range(24) if k not in (3, 5)}
    assert "'number 3'" in caplog.text
    assert caplog.text.count("skipped record 'thing 5") == 1
    with pytest.raises(DataError, match="max_bad_fraction"):
        training(Things(unread=(3, 4)), hold=hold)


def test_an_index_counts_every_image_and_leaves_out_what_has_no_class():
    index = index_objects(Things(unread=(0,)))
    assert index.pair_images.tolist() == list(range(1, 24))
    bare = ObjectAnnotation(name="", box=None, captions=("a light",))
    other = Record(id="x", images=(np.zeros((8, 8, 3), np.uint8),), objects=(bare,))
    counts = index_objects([*(Things()[k] for k in range(24)), other]).counts
    assert (counts.unnamed, counts.classes) == (1, 4)
    assert "1 without a class" in str(counts)


@pytest.mark.parametrize("in_memory", [False, True])
def test_give_measures_what_can_be_read(in_memory):
    """And its pictures are of the same records."""
    processor = tiny_clip_processor()
    options = {"classes": NAMES, "federated": False, "in_memory": in_memory}
    source = Things(unread=(3,), broken=(5,))
    evaluation = evaluation_of(source, processor, max_bad_fraction=0.1, **options)
    assert evaluation.annotations.count == len(evaluation.records) == 22
    assert numbers(evaluation.records)[3:5] == ["4", "6"]
    with pytest.raises(DataError, match="max_bad_fraction"):
        evaluation_of(source, processor, **options)


def tiny_clip_processor():
    from perception_jax.api import Processor

    return Processor(image=ImageProcessor(size=16), tokenizer=TOKENIZER)


def captioned(folder: pathlib.Path, count: int, broken: tuple = ()) -> pathlib.Path:
    for k in range(count):
        path = folder / f"{k:02}.png"
        PIL.Image.new("RGB", (8, 8), (k, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"number {k}")
        if k in broken:
            path.write_bytes(path.read_bytes()[:40])
    return folder


def test_own_images_train_and_test_by_one_setting(tmp_path, caplog):
    """Of twelve images the tenth is held out; batches of 32 have each several times."""
    config = clip_config.get_config("runlocal")
    config.data.source = str(captioned(tmp_path, 20, broken=(3, 9)))
    config.data.max_bad_fraction = 0.2
    task = program.task(config)
    assert [record.id for record in task.benchmark.pictures] == ["19.png"]
    assert task.benchmark.retrieval.images.captions == ("number 19",)
    assert "skipped record '09.png'" in caplog.text
    batches = iter(task.datasets()["train"])
    ids = set(next(batches)["id"].tolist()) | set(next(batches)["id"].tolist())
    batches.close()
    assert "03.png" not in ids
    assert "skipped record '03.png'" in caplog.text
    assert "18 records are fewer than the 32 of a batch" in caplog.text
    config.data.max_bad_fraction = 0.0
    with pytest.raises(DataError, match="allowed share of 0"):
        _ = program.task(config).benchmark


def test_few_pairs_for_a_batch_are_said(caplog):
    training(Things(8), hold=True)
    assert "fewer than" not in caplog.text
    training(Things(7), hold=True)
    assert "7 objects (7 pairs) of 4 classes" in caplog.text
    assert "are fewer than the 8 rows of a batch" in caplog.text


def test_every_config_with_own_data_has_the_setting():
    from configs.give import clip_b16

    for config in (clip_config, forkme, clip_b16):
        assert config.get_config().data.max_bad_fraction == 0.01


# --- Pixels at a time ---------------------------------------------------------------------------


@pytest.fixture
def small_budget(monkeypatch):
    monkeypatch.setattr(pixel_budget, "BUDGET", 1000)


def test_threads_wait_for_each_others_pixels(small_budget):
    most, lock = 0, threading.Lock()

    def load(pixels: int) -> None:
        nonlocal most
        for _ in range(5):
            with pixel_budget.scope():
                pixel_budget.take(pixels)
                with lock:
                    most = max(most, pixel_budget._taken)
                time.sleep(0.001)
                with pixel_budget.scope():  # a second image of the same record
                    pixel_budget.take(0)

    threads = [threading.Thread(target=load, args=(size,)) for size in (300, 400, 500, 600, 5000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert most == 5000  # alone; others together stay below the budget
    assert pixel_budget._taken == 0


def test_a_thread_never_waits_for_itself(small_budget):
    with pixel_budget.scope():
        pixel_budget.take(900)
        pixel_budget.take(900)
        assert pixel_budget._taken == 1800
    assert pixel_budget._taken == 0


def test_a_loader_holds_an_image_until_its_example_is_made(small_budget):
    """Four threads load ahead, but only one image of 40×20 pixels at a time."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (40, 20)).save(buffer, "PNG")
    inside, most = 0, 0
    lock = threading.Lock()

    class Encoded:
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return Record(id=str(index), images=(buffer.getvalue(),))

    def transform(record, rng):
        nonlocal inside, most
        pixels = images.decode(record.image)
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.002)
        with lock:
            inside -= 1
        return {"image": pixels}

    batches = iter(make_loader(Encoded(), transform, batch_size=4, seed=0))
    for _ in range(4):
        next(batches)
    batches.close()
    assert most == 1
    with pytest.raises(DataError):
        images.decode(b"no image")
    for _ in range(1000):  # threads that were loading ahead come to their end
        if not pixel_budget._taken:
            break
        time.sleep(0.01)
    assert pixel_budget._taken == 0
