"""What GiVE's training loss makes of a batch, against the model called row by row."""

from __future__ import annotations

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perception_jax.ops.image import normalise
from perception_jax.systems.give.adapter import InstructionFeatures
from perception_jax.systems.give.plus import PlusConfig
from perception_jax.systems.give.task import GiveTask, _Encoded
from perception_jax.train import state
from tests.tiny_give_task import make_task


@pytest.fixture(scope="module")
def give():
    """A task, a model whose adapters do something, and a batch."""
    task = make_task()
    batch = {k: v for k, v in next(iter(task.datasets()["train"])).items() if k != "id"}
    abstract = state.abstract_model(task)
    rng = np.random.default_rng(0)
    own = {
        path: jnp.asarray(0.2 * rng.normal(size=leaf.shape), jnp.float32)
        for path, leaf in abstract.trainable.items()
    }
    model = abstract.merge(own, dict(task.pretrained(abstract.frozen)))
    return task, model, jax.tree.map(jnp.asarray, batch)


def test_each_row_is_encoded_under_its_present_and_its_absent_instruction(give):
    task, model, batch = give
    image = task.backbone.processor.image

    @jax.jit
    def together(model, batch):
        pixels = normalise(batch["image"], image.mean, image.std)
        return [(one.embedding, one.logit) for one in task._encode(model, pixels, batch)]

    @jax.jit
    def alone(model, pixels, told):
        told = InstructionFeatures(**told, strength=jnp.float32(1.0))
        out = model(normalise(pixels, image.mean, image.std), told)
        return out.embedding, out.presence_logit

    present, absent = together(model, batch)
    for found, name in ((present, "instruction"), (absent, "absent_instruction")):
        expected = alone(model, batch["image"], batch[name])
        chex.assert_trees_all_close(found, expected, atol=1e-5)
    assert np.abs(present[0] - absent[0]).max() > 1e-3


def test_accuracy_counts_absent_ones_that_are_refused(give):
    task, model, batch = give
    head = model.oid_head.fc2
    kept = head.kernel[...], head.bias[...]
    head.kernel[...] = jnp.zeros_like(kept[0])
    loss = jax.jit(task.loss)
    try:
        for bias, present, absent in ((-5.0, 0.0, 1.0), (5.0, 1.0, 0.0)):
            head.bias[...] = jnp.full_like(kept[1], bias)
            _, metrics = loss(model, batch, jax.random.key(0))
            assert float(metrics["oid_accuracy"]) == (present + absent) / 2
            expected = float(jax.nn.softplus(5.0) + jax.nn.softplus(-5.0)) / 2
            assert float(metrics["oid"]) == pytest.approx(expected, rel=1e-5)
    finally:
        head.kernel[...], head.bias[...] = kept


def test_a_caption_without_an_altered_form_adds_no_column(give):
    task, model, batch = give
    altered = jnp.arange(len(batch["ids"])) % 2 == 0
    given = batch | {"altered_ids": batch["ids"], "altered": altered}
    width = task.backbone.config.embed_dim
    embedding = jnp.ones((len(altered), width)) / width**0.5
    present = _Encoded(embedding, jnp.zeros(len(altered)), None, (2, 2))
    config = dataclasses.replace(task.config, plus=PlusConfig(altered=True))
    changed = GiveTask(config, task.backbone, None)
    found = jax.jit(
        lambda model, batch: changed._altered_cosines(model, present, batch, jnp.dtype("float32"))
    )(model, given)
    np.testing.assert_array_equal(np.isneginf(found[:, 0]), ~np.asarray(altered))
