"""Order, resuming, hosts, workers, skipping and padding of the loader."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import subprocess
import sys
import textwrap
import threading
from unittest import mock

import grain
import numpy as np
import PIL.Image
import pytest

from perception_jax.data import records, worker_watch, workers
from perception_jax.data.loader import make_eval_loader, make_loader
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.sources.folder import ImageFolder
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.data.transforms import Augment, ImageTextTransform
from perception_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Records whose image holds their number; `bad` ones have no caption."""

    count: int
    bad: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> records.Record:
        captions = () if index in self.bad else (f"number {index}",)
        image = np.full((2, 2, 3), index % 256, np.uint8)
        return records.Record(id=f"n{index}", images=(image,), captions=captions)


def noisy(record: records.Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
    if not record.captions:
        raise DataError("has no caption")
    return {"image": record.image, "noise": rng.random(3)}


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


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory) -> pathlib.Path:
    """21 pictures of two classes, one of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k in range(20):
        path = folder / ("red fox" if k % 2 else "owl") / f"{k:02}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    (folder / "owl" / "broken.png").write_bytes(b"\x89PNG")
    return folder


def test_order_and_randomness_do_not_depend_on_the_workers(image_folder, caplog):
    source = ImageFolder(image_folder)
    transform = ImageTextTransform(
        processor=ImageProcessor(size=8),
        tokenizer=ClipTokenizer.shipped(600, 8),
        augment=Augment(min_area=0.5, flip=0.5),
    )
    runs = [
        take(make_loader(source, transform, batch_size=4, seed=3, num_workers=workers), 12)
        for workers in (0, 2, 4)
    ]
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])
    assert runs[0][0]["image"].dtype == np.uint8
    seen = np.concatenate([batch["id"] for batch in runs[0]])
    assert len(set(seen)) == 20
    assert "owl/broken.png" in caplog.text


def test_resuming_inside_an_epoch_gives_the_same_batches():
    """Also with another number of workers, and on the iterator that saved the state."""

    def loader(workers):
        source = Numbers(23, frozenset({5}))
        return make_loader(source, noisy, batch_size=4, seed=1, num_workers=workers)

    iterator = iter(loader(0))
    for _ in range(9):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    rest = [next(iterator) for _ in range(6)]
    assert_equal(take(loader(0), 6, state), rest)
    assert_equal(take(loader(2), 6, state), rest)
    iterator.set_state(state)
    assert_equal([next(iterator) for _ in range(6)], rest)


def test_a_state_of_other_data_is_refused():
    state = iter(make_loader(Numbers(8), noisy, batch_size=2, seed=1)).get_state()
    for source, seed, shuffle in (
        (Numbers(9), 1, True),
        (Numbers(8), 2, True),
        (Numbers(8), 1, False),
    ):
        loader = make_loader(source, noisy, batch_size=2, seed=seed, shuffle=shuffle)
        with pytest.raises(DataError, match="same data and seed"):
            take(loader, 1, state)


def test_hosts_share_one_global_batch():
    def batches(host, state=None):
        loader = make_loader(Numbers(10), noisy, batch_size=6, seed=2, host=host)
        return take(loader, 5, state)

    whole, parts = batches((0, 1)), [batches((k, 3)) for k in range(3)]
    for step, batch in enumerate(whole):
        joined = np.stack([part[step]["noise"] for part in parts], 1).reshape(6, 3)
        np.testing.assert_array_equal(batch["noise"], joined)
        assert set(batch["id"]) == {name for part in parts for name in part[step]["id"]}
    iterator = iter(make_loader(Numbers(10), noisy, batch_size=6, seed=2, host=(1, 3)))
    for _ in range(2):
        next(iterator)
    assert_equal(batches((0, 1), iterator.get_state())[:3], whole[2:])


def test_an_epoch_has_each_record_once_in_a_new_order():
    batches = take(make_loader(Numbers(12), noisy, batch_size=4, seed=0), 6)
    first, second = (np.concatenate([b["id"] for b in batches[k : k + 3]]) for k in (0, 3))
    assert set(first) == set(second) == {f"n{k}" for k in range(12)}
    assert first.tolist() != second.tolist()
    plain = take(make_loader(Numbers(5), noisy, batch_size=2, seed=0, shuffle=False, epochs=2), 9)
    assert [batch["id"].tolist() for batch in plain][:3] == [
        ["n0", "n1"],
        ["n2", "n3"],
        ["n4", "n0"],
    ]
    assert len(plain) == 5
    assert not np.array_equal(plain[0]["noise"][0], plain[2]["noise"][1])


def test_another_seed_draws_other_random_numbers():
    first, second = (
        take(make_loader(Numbers(8), noisy, batch_size=8, seed=seed, shuffle=False), 1)[0]
        for seed in (1, 2)
    )
    np.testing.assert_array_equal(first["id"], second["id"])
    assert not np.isin(first["noise"], second["noise"]).any()


def test_bad_records_are_skipped_counted_and_named_once(caplog):
    skipped = []
    loader = make_loader(
        Numbers(10, frozenset({3})), noisy, batch_size=3, seed=0, on_skip=skipped.append
    )
    ids = {name for batch in take(loader, 12) for name in batch["id"]}
    assert ids == {f"n{k}" for k in range(10) if k != 3}
    assert [(bad.index, bad.id, bad.reason) for bad in skipped] == [(3, "n3", "has no caption")]
    assert caplog.text.count("skipped record 'n3': has no caption") == 1


@pytest.mark.parametrize(
    ("count", "bad", "share", "stops"),
    [
        (20, 2, 0.05, True),
        (30, 2, 0.05, True),  # the allowed count is rounded down
        (20, 2, 0.10, False),
        (20, 1, 0.01, False),
        (20, 1, 0.0, True),
        (1, 1, 0.5, True),
        (3000, 5, 0.001, True),
    ],
)
def test_too_many_bad_records_stop_the_run(count, bad, share, stops):
    source = Numbers(count, frozenset(range(bad)))
    loader = make_loader(
        source, noisy, batch_size=1, seed=0, shuffle=count < 1000, max_bad_fraction=share
    )
    if stops:
        with pytest.raises(DataError, match=f"allowed share of {share:g}") as caught:
            take(loader, 1100)
        assert "Grain" not in str(caught.value)
    else:
        assert len(take(loader, 50)) == 50


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_transform_names_the_record(workers):
    def buggy(record, rng):
        class Unpicklable(Exception):
            def __init__(self, one, two):
                super().__init__(one + two)

        raise Unpicklable("so", "rry")

    loader = make_loader(Numbers(4), buggy, batch_size=2, seed=0, num_workers=workers)
    with pytest.raises(DataError, match=r"(?s)record 'n\d'.*buggy.*sorry"):
        take(loader, 1)


def test_arrays_that_do_not_stack_are_named():
    def ragged(record, rng):
        return {"tokens": np.zeros(1 + record.image[0, 0, 0])}

    def moody(record, rng):
        return {f"x{record.image[0, 0, 0]}": np.zeros(1)}

    for transform, message in ((ragged, "one shape for 'tokens'"), (moody, "same names")):
        loader = make_loader(Numbers(4), transform, batch_size=2, seed=0)
        with pytest.raises(DataError, match=message):
            take(loader, 1)


def test_evaluation_sees_each_record_once_on_any_number_of_hosts():
    source = Numbers(9, frozenset({4}))
    for hosts in (1, 2, 4):
        rows = []
        for host in range(hosts):
            loader = make_eval_loader(source, noisy, batch_size=4, host=(host, hosts))
            batches = take(loader, 99)
            assert len(batches) == 3
            assert all(batch["image"].shape == (4 // hosts, 2, 2, 3) for batch in batches)
            rows += [
                (name, bool(ok))
                for b in batches
                for name, ok in zip(b["id"], b["valid"], strict=True)
            ]
        good = [(f"n{k}", True) for k in range(9) if k != 4]
        assert sorted(rows) == sorted([*good, ("n4", False), *[("", False)] * 3])


def test_evaluation_of_nothing_usable_stops():
    with pytest.raises(DataError, match="none of the 3 records"):
        take(make_eval_loader(Numbers(3, frozenset(range(3))), noisy, batch_size=2), 9)


def test_settings_that_do_not_fit_are_refused():
    def make(count=8, **changes):
        return make_loader(Numbers(count), noisy, **{"batch_size": 4, "seed": 0, **changes})

    for changes, message in (
        ({"batch_size": 3, "host": (0, 2)}, "multiple of the 2 hosts"),
        ({"batch_size": 0}, "positive"),
        ({"host": (2, 2)}, "2 of 2"),
        ({"num_workers": -1}, "num_workers"),
        ({"epochs": 0}, "epochs"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**changes)
    with pytest.raises(DataError, match="no records"):
        make(count=0)
    with pytest.raises(DataError, match="do not fill one batch"):
        make(batch_size=20, epochs=2)


def test_a_script_without_a_main_guard_can_use_workers(tmp_path, root):
    """And a worker does not outlive a main process that is killed."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, signal
            import numpy as np, psutil
            from perception_jax.data import records, worker_watch, workers
            from perception_jax.data.loader import make_loader

            print("script starts", flush=True)

            class Mine:
                def __len__(self):
                    return 8
                def __getitem__(self, index):
                    image = np.full((2, 2, 3), index, np.uint8)
                    return records.Record(id=str(index), images=(image,))

            def transform(record, rng):
                return {"image": record.image}

            batches = iter(make_loader(Mine(), transform, batch_size=4, seed=0, num_workers=2))
            print(next(batches)["image"].shape, flush=True)
            print(*(child.pid for child in psutil.Process().children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, script], cwd=root, capture_output=True, text=True, timeout=120
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["script starts", "(4, 2, 2, 3)"], done.stderr
    psutil = pytest.importorskip("psutil")
    for pid in lines[2].split():
        try:
            psutil.Process(int(pid)).wait(timeout=20)
        except psutil.NoSuchProcess:
            continue


def test_closing_ends_where_a_worker_was_killed_while_it_sent(monkeypatch):
    """grain then waits for the rest of an element for ever."""
    monkeypatch.setattr(worker_watch, "CLOSE_SECONDS", 0.05)
    never = threading.Event()
    stream = mock.create_autospec(grain.DatasetIterator, instance=True)
    stream.close.side_effect = never.wait
    loading = workers.ClosableIterator(stream, num_workers=1)
    closing = threading.Thread(target=loading.close, daemon=True)
    closing.start()
    closing.join(30)
    ended = not closing.is_alive()
    never.set()
    assert ended
