"""Training a tiny Llama: packed rows, all weights and LoRA, resuming, held-out perplexity."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.data.packing import KEYS
from perception_jax.errors import ConfigError, DataError
from perception_jax.models.params import flatten, unflatten
from perception_jax.nn.lora import LoraConfig
from perception_jax.ops.next_token import IGNORE
from perception_jax.systems.text.perplexity import Perplexity
from perception_jax.systems.text.task import TextTask, TextTaskConfig, row_loss
from perception_jax.testing import tiny_llama
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from perception_jax.train.state import abstract_model
from tests.tiny_text import LENGTH, corpus, data, task

LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.25)


@pytest.fixture(scope="module")
def base():
    return tiny_llama.loaded()


def batch_of(rows) -> dict[str, jax.Array]:
    return {key: jnp.asarray(rows[:, place]) for place, key in enumerate(KEYS)}


def test_packed_and_unpacked_rows_have_one_loss_and_one_gradient(base):
    packed, plain = data(), data(packed=False)
    assert packed.counts.rows < plain.counts.rows / 1.5

    @jax.jit
    def of(leaves, batch):
        model = unflatten(base.model, leaves)
        found = row_loss(model, batch, chunk=32, remat="full")
        return found.mean(), found.count

    gradient = jax.jit(jax.value_and_grad(of, has_aux=True))
    (one,), (many,) = packed.parts(packed.counts.rows), plain.parts(plain.counts.rows)
    leaves = flatten(base.model)
    (first, counted), first_gradient = gradient(leaves, batch_of(one))
    (second, again), second_gradient = gradient(leaves, batch_of(many))
    assert counted == again > 50
    np.testing.assert_allclose(first, second, atol=1e-5, rtol=0)
    for path, leaf in first_gradient.items():
        np.testing.assert_allclose(leaf, second_gradient[path], atol=1e-5, err_msg=path)
    # Without the numbers of the records they would see each other.
    (other, _), _ = gradient(leaves, batch_of(one) | {"segment": jnp.ones_like(one[:, 2])})
    assert abs(other - first) > 1e-3


def run(task: TextTask, folder, *, steps: int = 6, stop=None, **optim):
    config = TrainConfig.from_mapping(
        {
            "steps": steps,
            "batch_size": task.config.batch_size,
            "log_every": 1,
            "checkpoint_every": 0,
            "optim": {"learning_rate": 1e-2, "weight_decay": 0.0, **optim},
        }
    )
    return loop.run(task, config, folder, devices=jax.devices()[:1], stop=stop)


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


def test_the_loss_falls(tmp_path):
    trained = task()
    result = run(trained, tmp_path, steps=30)
    curve = losses(tmp_path)
    assert curve[0] == pytest.approx(math.log(trained.base.config.vocab_size), rel=0.2)
    assert curve[-1] < 0.5 * curve[0]
    counted = [row["tokens"] for row in read_metrics(tmp_path) if "loss" in row]
    assert min(counted) > 20
    assert 0 <= result.metrics["accuracy"] <= 1


def test_a_run_resumes_bit_for_bit(tmp_path):
    run(task(), tmp_path / "whole")
    run(task(), tmp_path / "parts", stop=lambda step: step == 3)
    run(task(), tmp_path / "parts")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 6


def test_lora_trains_alone_and_starts_as_the_model(base, tmp_path):
    adapted = task(base, lora=LORA, layers=("blocks/attention/[qv]_proj",))
    model = abstract_model(adapted)
    assert set(model.trainable) == {
        f"blocks/attention/{name}_proj/lora/{part}" for name in "qv" for part in "ab"
    }
    result = run(adapted, tmp_path)
    trained, before = flatten(result.model), flatten(base.model)
    for path, leaf in before.items():
        np.testing.assert_array_equal(trained[path], leaf)
    assert np.abs(trained["blocks/attention/q_proj/lora/b"]).max() > 0
    curve = losses(tmp_path)
    assert curve[-1] < curve[0]


def test_dropout_of_lora_follows_the_key(base):
    def of(rate):
        lora = LoraConfig(rank=2, alpha=4.0, dropout=rate)
        adapted = task(base, lora=lora)
        model = nnx.eval_shape(lambda: adapted.init(jax.random.key(0)))
        rng = np.random.default_rng(0)
        leaves = {
            path: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype)
            for path, leaf in flatten(model).items()
        }
        (rows,) = adapted.data.parts(adapted.data.counts.rows)
        loss = jax.jit(lambda key: adapted.loss(unflatten(model, leaves), batch_of(rows), key)[0])
        return [float(loss(jax.random.key(k))) for k in (0, 0, 1)]

    first, again, other = of(0.25)
    assert first == again != other
    first, again, other = of(0.0)
    assert first == again == other


def test_perplexity_of_held_out_texts(base):
    held_out = data(corpus(20, seed=9))
    (rows,) = held_out.parts(held_out.counts.rows)
    whole = jax.jit(lambda batch: row_loss(base.model, batch, chunk=32))(batch_of(rows))
    expected = float(whole.mean())
    found = Perplexity(held_out, batch_size=3, dtype="float32")(base.model)
    assert found["loss"] == pytest.approx(expected, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    assert found["tokens"] == int(whole.count)
    assert found["accuracy"] == int(whole.correct) / int(whole.count)


def test_texts_without_a_token_to_predict(base, monkeypatch):
    rows = np.zeros((3, len(KEYS), LENGTH), np.int32)
    rows[:, KEYS.index("label")] = IGNORE
    held_out = data(corpus(2))
    monkeypatch.setattr(held_out, "parts", lambda size: iter([rows]))
    with pytest.raises(DataError, match="expected tokens to predict, found none"):
        Perplexity(held_out, batch_size=3, dtype="float32")(base.model)


def test_faults_of_the_settings(base):
    with pytest.raises(ConfigError, match="at most 256 tokens, the model's context, found 300"):
        TextTask(TextTaskConfig(batch_size=1, length=300), base, None)
    with pytest.raises(ConfigError, match="expected the weights of a model to adapt"):
        TextTask(TextTaskConfig(batch_size=1, length=LENGTH, lora=LORA), base, None, scratch=True)
