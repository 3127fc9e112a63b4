"""Training a tiny LLaVA with two towers: what trains, the mean over devices, text alone, errors."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.data.grouping import Division
from perception_jax.data.image_chats import IMAGES
from perception_jax.errors import ConfigError
from perception_jax.inference.held_out import HeldOutLoss
from perception_jax.models.params import flatten
from perception_jax.nn.lora import LoraConfig
from perception_jax.systems.mof.task import MofTask, MofTaskConfig, chat_predictions
from perception_jax.testing import tiny_llava
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from perception_jax.train.state import abstract_model
from tests.tiny_chats import Chats
from tests.tiny_mof import LENGTHS, batches, chats, task

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.25)


def parts(paths) -> set[str]:
    return {path.split("/")[0] for path in paths}


@pytest.mark.parametrize(
    ("trains", "lora", "trained"),
    [
        ("projectors", None, {"projector", "second_projector"}),
        ("all", None, {"projector", "second_projector", "language"}),
        ("lora", LORA, {"projector", "second_projector", "language"}),
    ],
)
def test_what_a_stage_trains(trains, lora, trained):
    model = abstract_model(task(trains=trains, lora=lora), "bfloat16")
    assert parts(model.trainable) == trained
    assert {"vision", "second_vision"} <= parts(model.frozen)
    assert {leaf.dtype for leaf in model.frozen.values()} == {jnp.dtype("bfloat16")}
    own = {path for path in model.trainable if path.startswith("language/")}
    frozen = {path for path in model.frozen if path.startswith("language/")}
    if trains == "lora":
        names = {path.split("/")[-3] for path in own}
        assert names == {"q_proj", "k_proj", "v_proj", "out_proj", "gate", "up", "down"}
        assert all("/lora/" in path for path in own)
    assert bool(frozen) == (trains != "all")


def run(one: MofTask, folder, *, steps: int = 12, **optim):
    config = TrainConfig.from_mapping(
        {
            "steps": steps,
            "batch_size": one.config.batch_size,
            "log_every": 1,
            "checkpoint_every": 0,
            "optim": {"learning_rate": 3e-3, "weight_decay": 0.0, **optim},
        }
    )
    return loop.run(one, config, folder, devices=jax.devices()[:1])


@pytest.mark.parametrize("trains", ["projectors", "all"])
def test_the_loss_falls_and_frozen_parts_stay(tmp_path, trains):
    one = task(trains=trains, order="random")
    before = jax.tree.map(np.asarray, flatten(one.base.model))
    result = run(one, tmp_path)
    losses = [row["loss"] for row in read_metrics(tmp_path) if "loss" in row]
    assert len(losses) == 12
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - (0.5 if trains == "all" else 0.002)
    after = flatten(result.model)
    moved = {path for path in after if not np.array_equal(after[path], before[path])}
    trained = {"projector", "second_projector"} | ({"language"} if trains == "all" else set())
    assert parts(moved) == trained


def test_the_loss_is_the_mean_over_devices_also_of_text_alone():
    by_device, by_token = task(), task(device_mean=False)
    assert not hasattr(by_device, "mean_over")
    assert by_token.mean_over == "tokens"
    model, key = by_device.base.model, jax.random.key(0)
    loss = {
        one: jax.jit(lambda model, batch, one=one: one.loss(model, batch, key))
        for one in (by_device, by_token)
    }
    kinds = set()
    for batch in batches(by_device, 6):
        kinds.add(IMAGES in batch)
        found, metrics = loss[by_device](model, batch)
        devices = [
            {key: x[batch["group"] == device] for key, x in batch.items()} for device in (0, 1)
        ]
        alone = [loss[by_token](model, own) for own in devices]
        np.testing.assert_allclose(found, np.mean([one[0] for one in alone]), atol=1e-5)
        assert metrics["tokens"] == sum(one[1]["tokens"] for one in alone)
        tokens = [one[1]["tokens"] for one in alone]
        whole = np.average([one[0] for one in alone], weights=tokens)
        np.testing.assert_allclose(loss[by_token](model, batch)[0], whole, atol=1e-5)
    assert kinds == {True, False}


def test_an_image_without_its_place_changes_nothing():
    """Rows of text alone in a batch with images."""
    one = task()
    batch = next(batch for batch in batches(one, 6) if IMAGES in batch)
    batch["ids"] = np.where(batch["ids"] < 0, 5, batch["ids"])
    loss = jax.jit(lambda batch: one.loss(one.base.model, batch, jax.random.key(0))[0])
    other = {**batch, IMAGES: batch[IMAGES] // 2}
    bare = {key: x for key, x in batch.items() if key != IMAGES}
    assert loss(batch) == loss(other)
    np.testing.assert_allclose(loss(batch), loss(bare), atol=1e-6)


def test_declared_shapes_are_those_of_the_batches():
    one = task(lengths=(176, 256))
    declared = [
        {key: (leaf.shape, leaf.dtype) for key, leaf in shape.items()}
        for shape in one.batch_shapes()
    ]
    assert len(declared) == 4
    for batch in batches(one, 6):
        assert {key: (x.shape, x.dtype) for key, x in batch.items()} in declared


def test_micro_batches_of_whole_devices_give_one_gradient(tmp_path):
    whole = task(division=Division(rows=2, devices=2, accumulate=2), order="random")
    first = run(whole, tmp_path / "whole", steps=2)
    parted = run(whole, tmp_path / "parted", steps=2, accumulate=2)
    for path, leaf in flatten(first.model).items():
        np.testing.assert_allclose(leaf, flatten(parted.model)[path], atol=2e-4, err_msg=path)
    rows = [
        [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("whole", "parted")
    ]
    np.testing.assert_allclose(*rows, atol=1e-5)


def test_held_out_conversations_are_measured_in_any_batches():
    base = tiny_llava.loaded(tiny_llava.AMOF)
    held_out = chats(base, Chats.made(9))
    found = [
        HeldOutLoss(chat_predictions(batch_size=size, dtype="float32", chunk=32), held_out)
        for size in (2, 4)
    ]
    found = [one(base.model) for one in found]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["tokens"] > 20
    assert 4 < found[0]["loss"] < 8


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match="expected one of projectors, all, lora, found 'llm'"):
        MofTaskConfig(batch_size=2, lengths=LENGTHS, trains="llm")
    with pytest.raises(ConfigError, match="expected settings of LoRA for 'lora'"):
        MofTaskConfig(batch_size=2, lengths=LENGTHS, trains="lora")
    config = MofTaskConfig(batch_size=2, lengths=(512,))
    base = tiny_llava.loaded()
    with pytest.raises(ConfigError, match="rows of at most 256 tokens"):
        MofTask(config, base, None)
    with pytest.raises(ConfigError, match="expected the weights of a language model"):
        MofTask(dataclasses.replace(config, lengths=(64,)), base, None, drawn=("language",))
