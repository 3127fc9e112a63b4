"""What goes wrong in a run: kills, signals, NaN, damaged or unwritable checkpoints, wrong use."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import signal
import time
from typing import Any

import jax
import numpy as np
import pytest

from perception_jax.errors import CheckpointError, ConfigError, DataError, TrainingError
from perception_jax.systems.contrastive.data import ContrastiveData
from perception_jax.testing import tiny_clip
from perception_jax.train import checkpoint, integrity, loop, restore
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from tests.tiny_training import TinyTask, program, wait_for_step


def train(workdir: pathlib.Path, task: Any = None, stop: Any = None, **settings: Any) -> Any:
    """On one device, in this process."""
    defaults = {"steps": 6, "batch_size": 16, "log_every": 1, "checkpoint_every": 2}
    resolved = settings.pop("resolved", None)
    config = TrainConfig.from_mapping({**defaults, **settings})
    return loop.run(
        task or TinyTask(),
        config,
        workdir,
        resolved_config=resolved,
        stop=stop,
        devices=jax.devices()[:1],
    )


def curve(workdir: pathlib.Path) -> list[tuple[Any, ...]]:
    """All that is not a rate, exactly."""
    keys = ("step", "loss", "grad_norm", "param_norm", "update_ratio", "evaluate/norm/kernel")
    return [tuple(line.get(key) for key in keys) for line in read_metrics(workdir)]


def test_killed_and_resumed_is_bit_equal_to_uninterrupted(root, tmp_path):
    killed_at = 9  # the save of step 8 may still be under way
    settings = {"steps": 20, "checkpoint_every": 4, "evaluate_every": 7}
    with program(root, tmp_path / "killed", **settings, hold_at=5, pause=0.15) as child:
        wait_for_step(child, 4)
        wait_for_step(child, killed_at)
        while not checkpoint.steps(tmp_path / "killed" / "checkpoints"):
            time.sleep(0.01)  # it waits too, after step 5
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL
    for name in ("whole", "killed"):
        with program(root, tmp_path / name, **settings) as child:
            out, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
    assert "step 1\n" not in out  # the killed one did resume
    assert len(curve(tmp_path / "whole")) == 20 + 3
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole"), f"killed at {killed_at}"


def test_sigterm_saves_and_exits_0_and_the_workdir_has_one_owner(root, tmp_path):
    with program(root, tmp_path, steps=10_000, checkpoint_every=0, pause=0.05) as child:
        wait_for_step(child, 3)
        with pytest.raises(TrainingError, match=f"in use by process {child.pid} on "):
            train(tmp_path)
        child.send_signal(signal.SIGTERM)
        out, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert "finishing this step, then saving" in errors
    done = int(out.split("stopped ")[1])
    assert done >= 3
    assert checkpoint.steps(tmp_path / "checkpoints") == [done]
    assert (tmp_path / ".lock").read_text() == ""


def test_a_run_that_did_fewer_steps_than_asked_exits_with_1(root, tmp_path):
    with program(root, tmp_path, steps=10, repeat=False) as child:  # there are 4 batches
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "DataError: the training dataset ended" in errors
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]


def test_first_ctrl_c_saves_and_the_handlers_come_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    result = train(tmp_path, stop=lambda step: step == 3 and signal.raise_signal(signal.SIGINT))
    assert (result.step, result.finished) == (3, False)
    assert signal.getsignal(signal.SIGINT) is before
    assert train(tmp_path).finished


def test_second_ctrl_c_stops_at_once(tmp_path):
    def twice(step: int) -> bool:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return False

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop=twice)
    assert train(tmp_path).finished  # the lock is free again


def test_nan_stops_with_step_checkpoint_and_records(tmp_path):
    batches = iter(TinyTask().datasets()["train"])
    fourth = [next(batches) for _ in range(4)][3]
    poison = int(fourth["id"][5].removeprefix("pair-"))  # 4 batches are an epoch: seen here first
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, TinyTask(poison=poison), steps=20, checkpoint_every=1)
    message = str(caught.value)
    assert "step 4 is not finite (loss nan" in message
    assert f"last good checkpoint is step 3 ({tmp_path}/checkpoints/3)" in message
    assert f"{fourth['id'][0]}, {fourth['id'][1]}" in message
    (file,) = tmp_path.glob("not_finite_step_4_*.json")
    assert json.loads(file.read_text())["ids"] == list(fourth["id"])
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2, 3]
    model, _ = restore.load_model(TinyTask(), tmp_path)
    assert np.isfinite(model.image.kernel[...]).all()


def test_nan_without_a_checkpoint_says_so(tmp_path):
    task = TinyTask()
    task.loss = lambda model, batch, key: (jax.numpy.nan * model.logit_scale[...], {})
    with pytest.raises(TrainingError, match=r"step 1 is not finite.*there is no checkpoint yet"):
        train(tmp_path, task)


def test_a_gradient_that_is_not_finite_stops_at_its_own_step(tmp_path):
    """Though the loss is finite."""
    task = TinyTask()
    task.loss = lambda model, batch, key: (jax.numpy.sqrt(0.0 * model.logit_scale[...]), {})
    with pytest.raises(TrainingError, match=r"step 1 is not finite \(loss 0\.0, grad_norm nan"):
        train(tmp_path, task)


def test_changed_settings_are_refused_and_listed(tmp_path):
    resolved = {"data": {"size": 32}, "model": {"width": 8}}
    train(tmp_path, steps=4, resolved=resolved)
    with pytest.raises(ConfigError) as caught:
        train(
            tmp_path,
            steps=3,
            optim={"learning_rate": 0.5},
            log_every=7,
            resolved={"data": {"size": 64}, "model": {"width": 8}, "new": 1},
        )
    lines = str(caught.value).split("\n")
    assert [line.strip() for line in lines if line.startswith("  ")] == [
        "data.size: 32 before, 64 now",
        "new: not set before, 1 now",
        "train.optim.learning_rate: 0.001 before, 0.5 now",
        "train.steps: 4 before, 3 now",
    ]
    allowed = {"steps": 6, "log_every": 3, "evaluate_every": 2, "checkpoint_every": 1, "keep": 1}
    assert train(tmp_path, resolved=resolved, **allowed).step == 6


def test_a_run_that_saved_nothing_may_change_its_settings(tmp_path):
    with pytest.raises(TrainingError):
        train(tmp_path, TinyTask(poison=11), steps=20, checkpoint_every=0)
    train(tmp_path, optim={"learning_rate": 0.5})
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == [*range(1, 7)]


def damage(path: pathlib.Path, how: str) -> None:
    """Harms the largest file under `path`; of a whole checkpoint it holds the arrays."""
    file = max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    if how == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif how == "delete":
        file.unlink()
    elif how == "digit":  # of a text: what is left is valid, and another place
        changed = re.sub(rb"\d", lambda found: b"%d" % ((int(found[0]) + 1) % 10), content, count=1)
        assert changed != content
        file.write_bytes(changed)
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("part", "how"),
    [("state", "truncate"), ("state", "delete"), ("state", "flip"), ("data", "digit")],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, caplog, part, how):
    train(tmp_path / "whole")
    train(tmp_path / "hurt", stop=lambda step: step == 4)
    damage(tmp_path / "hurt" / "checkpoints" / "4" / part, how)
    with caplog.at_level("WARNING"):
        train(tmp_path / "hurt")
    assert f"checkpoints/4 is damaged ({part}/" in caplog.text
    assert "continues from step 2" in caplog.text
    assert (tmp_path / "hurt" / "damaged_checkpoints" / "4" / "files.json").exists()
    assert curve(tmp_path / "hurt") == curve(tmp_path / "whole")
    assert checkpoint.steps(tmp_path / "hurt" / "checkpoints") == [2, 4, 6]


def test_if_all_checkpoints_are_damaged_nothing_is_touched(tmp_path):
    train(tmp_path)
    for step in (2, 4, 6):
        damage(tmp_path / "checkpoints" / str(step), "truncate")
    with pytest.raises(CheckpointError, match=r"(?s)none of the 3 checkpoints.*/6: state.*/2: st"):
        train(tmp_path)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4, 6]
    with pytest.raises(CheckpointError, match=r"/4 is damaged: state/.* bytes, .* were written"):
        restore.load_model(TinyTask(), tmp_path, step=4)


@pytest.mark.parametrize("where", ["integrity.find_damage", "ocp.load_checkpointables"])
def test_a_checkpoint_that_its_run_replaces_meanwhile_is_not_read(tmp_path, monkeypatch, where):
    train(tmp_path, steps=4)
    older = tmp_path / "checkpoints" / "2"
    newer = (tmp_path / "checkpoints" / "4").rename(tmp_path / "newer")
    module, name = where.split(".")
    owner = getattr(checkpoint, module)
    real = getattr(owner, name)

    def then_replace(path: pathlib.Path, *args: Any, **more: Any) -> Any:
        found = real(path, *args, **more)
        if newer.exists():
            newer.rename(tmp_path / "checkpoints" / "4")
            shutil.rmtree(older / "state")  # as far as its deletion has come
        return found

    monkeypatch.setattr(owner, name, then_replace)
    assert restore.load_model(TinyTask(), tmp_path)[1] == 4
    with pytest.raises(CheckpointError, match=r"/2 is damaged: state/.* is missing"):
        restore.load_model(TinyTask(), tmp_path, step=2)


def test_a_full_disk_leaves_the_earlier_checkpoints(root, tmp_path):
    with program(
        root, tmp_path, steps=14, checkpoint_every=4, log_every=99, hold_at=5, full=True
    ) as child:
        _, errors = child.communicate(timeout=120)
    assert child.returncode == 1
    assert "CheckpointError: the checkpoint of step 8 could not be written to" in errors
    assert f"The checkpoint of step 4 ({tmp_path}/checkpoints/4) is intact" in errors
    assert "CheckpointError" in errors[errors.rindex("\nTraceback") :]  # the last word, not orbax's
    assert "Thread.run() raised" not in errors
    assert "thread (save_finalize) failed" not in errors
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]
    assert train(tmp_path, steps=14, checkpoint_every=4, log_every=99).finished
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))  # what the failed save left is gone


def reseal(checkpoint_path: pathlib.Path) -> None:
    """As if the checkpoint had been written with what is in it now."""
    integrity.write_list(checkpoint_path, integrity.checksums(checkpoint_path))


def test_a_missing_place_in_the_data_is_named(tmp_path):
    train(tmp_path, steps=2)
    saved = tmp_path / "checkpoints" / "2"
    meta = saved / "meta" / "meta.json"
    meta.write_text(meta.read_text().replace('"process_count": 1', '"process_count": 4'))
    reseal(saved)
    with pytest.raises(CheckpointError, match=r"position in the data .*process_0-of-4.json, found"):
        train(tmp_path)


def test_a_data_folder_that_grew_is_refused_and_nothing_is_lost(tmp_path):
    """The order of the data, and so the place in it, depends on how many records there are."""

    def task_of(length: int):
        task = tiny_clip.task()
        source = tiny_clip.ColourSource(length)
        task.data = ContrastiveData(source, tiny_clip.PROCESSOR, batch_size=16, seed=0)
        return task

    assert train(tmp_path, task_of(64), stop=lambda step: step == 2, steps=3).step == 2
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(DataError, match=r"64.*65|65.*64"):
        train(tmp_path, task_of(65), steps=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == saved
    assert train(tmp_path, task_of(64), steps=3).finished


def test_the_best_checkpoint_stays(tmp_path):
    scores = (0.3, 0.9, 0.5, 0.1, 0.2, 0.2)
    settings = {"keep": 1, "evaluate_every": 1, "checkpoint_every": 1}
    name = "evaluate/scripted/score"
    train(tmp_path / "up", TinyTask(scores=scores), keep_best=name, **settings)
    assert checkpoint.steps(tmp_path / "up" / "checkpoints") == [2, 6]
    train(tmp_path / "down", TinyTask(scores=scores), keep_best=f"-{name}", **settings)
    assert checkpoint.steps(tmp_path / "down" / "checkpoints") == [4, 6]
    # A resumed run still knows which was best.
    more = {**settings, "steps": 8, "keep_best": name}
    train(tmp_path / "up", TinyTask(scores=(0.8, 0.7)), **more)
    assert checkpoint.steps(tmp_path / "up" / "checkpoints") == [2, 8]


@pytest.mark.parametrize("left", ["whole", "half"])
def test_checkpoints_that_a_killed_run_could_not_delete_are_deleted(tmp_path, left):
    train(tmp_path, stop=lambda step: step == 4)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4]
    if left == "half":
        (tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA").unlink()
        shutil.rmtree(tmp_path / "checkpoints" / "2" / "meta")
    train(tmp_path, stop=lambda step: step == 5, keep=1, checkpoint_every=0)
    assert checkpoint.steps(tmp_path / "checkpoints") == [5]
    train(tmp_path, keep=1)
    (tmp_path / "checkpoints" / "2").mkdir()
    train(tmp_path, keep=1)  # has ended before: nothing but deleting is left to do
    assert checkpoint.steps(tmp_path / "checkpoints") == [6]


def test_a_finished_run_does_nothing_again(tmp_path):
    first_time = train(tmp_path, TinyTask(scores=(0.5,)))
    lines = (tmp_path / "metrics.jsonl").read_text()
    again = train(tmp_path, TinyTask(scores=(0.7,)))
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    assert again.metrics == first_time.metrics


class Batches(TinyTask):
    """Changes batches on their way."""

    change: Any = None

    def datasets(self) -> dict[str, Any]:
        count = iter(range(1, 1000))
        return {
            "train": super().datasets()["train"].map(lambda b: self.change(dict(b), next(count)))
        }


def cut(batch: dict[str, Any], count: int) -> dict[str, Any]:
    return {key: value[:8] for key, value in batch.items()}


def widen(batch: dict[str, Any], count: int) -> dict[str, Any]:
    return {**batch, "text": np.pad(batch["text"], ((0, 0), (0, int(count == 3))))}


def name(batch: dict[str, Any], count: int) -> dict[str, Any]:
    return {**batch, "caption": batch["id"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"'image': expected 16 examples on its first axis .*found shape \(8, 12\)"),
        (
            widen,
            r"pair-.*the shape of the first, text float32\[16, 6\], found text float32\[16, 7\]",
        ),
        (name, r"'caption' has dtype <U7; only numbers"),
    ],
)
def test_batches_that_do_not_fit_are_named(tmp_path, change, message):
    task = Batches()
    task.change = change
    with pytest.raises(DataError, match=message):
        train(tmp_path, task)


def test_a_dataset_that_ends_is_an_error(tmp_path):
    with pytest.raises(DataError, match="training dataset ended"):
        train(tmp_path, TinyTask(repeat=False))


def test_a_dataset_that_cannot_resume_is_refused(tmp_path):
    task = TinyTask()
    task.datasets = lambda: {"train": [{"image": np.zeros((16, 12))}]}
    with pytest.raises(ConfigError, match=r"a list whose iterator has no `get_state`"):
        train(tmp_path, task)


def test_a_task_must_not_take_the_trainer_s_metric_names(tmp_path):
    task = TinyTask()
    task.loss = lambda model, batch, key: (model.logit_scale[...], {"loss": 1.0})
    with pytest.raises(ConfigError, match=r"metrics \['loss'\], which the trainer itself"):
        train(tmp_path, task)


def test_batch_size_must_divide(tmp_path):
    config = TrainConfig.from_mapping({"steps": 1, "batch_size": 12})
    with pytest.raises(ConfigError, match="batch_size 12 must be divisible by the 8 batch shards"):
        loop.run(TinyTask(), config, tmp_path)


def test_a_url_is_no_workdir():
    with pytest.raises(ConfigError, match="found a URL") as caught:
        train("gs://bucket/runs/one")
    assert "gcsfuse --implicit-dirs" in str(caught.value)
    assert "use the workdir /mnt/bucket/runs/one." in str(caught.value)
    with pytest.raises(ConfigError, match="found a URL") as caught:
        train("s3://bucket/run")
    assert "gcsfuse" not in str(caught.value)
