"""Micro-batches inside the step: the same numbers as the whole batch, and one reduction."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax.errors import ConfigError
from perception_jax.models.clip.modeling import ClipVisionTower
from perception_jax.models.llama.modeling import Llama
from perception_jax.models.shardings import SHARDINGS
from perception_jax.nn.linear import Linear
from perception_jax.ops.losses import softmax_contrastive, unit
from perception_jax.ops.next_token import IGNORE, next_token_loss
from perception_jax.shard import mesh as mesh_lib
from perception_jax.shard import traffic
from perception_jax.shard.rules import fsdp_largest_axis
from perception_jax.testing import tiny_llama
from perception_jax.testing.tiny_clip import CONFIG, SIZE
from perception_jax.train.accumulate import in_micro_batches
from perception_jax.train.config import TrainConfig
from perception_jax.train.feed import BatchFeed
from perception_jax.train.state import TrainState
from perception_jax.train.step import CompiledStep
from perception_jax.train.task_step import TaskStep

ROWS, PATCHES, TOKENS, UPDATES = 32, 4, 12, 3
MESHES = {
    "one": ({}, 1),
    "fsdp": ({"fsdp": 8}, 8),
    "copies": ({"replica": 4, "fsdp": 2}, 8),
    "all": ({"replica": 2, "fsdp": 2, "tensor": 2}, 8),
}
OPTIM = {
    "name": "sgd",
    "learning_rate": 1.0,
    "schedule": "linear",
    "warmup_steps": 1,
    "clip_norm": 0.05,
    "ema": 0.75,
    "rules": ((r"class_embedding$", None), (r".*",)),
}


class Patches(nnx.Module):
    """A number for each patch of an image."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tower = ClipVisionTower(CONFIG.vision, CONFIG.embed_dim, rngs=rngs)
        self.head = Linear(CONFIG.vision.width, 1, rngs=rngs)


class PatchTask:
    """The mean error over patches; rows compare nothing with each other."""

    trainable: Any = nnx.Param
    shardings: Any = (*SHARDINGS, (r".*", fsdp_largest_axis()))
    mean_over = "rows"

    def init(self, key: jax.Array) -> nnx.Module:
        return Patches(nnx.Rngs(params=key))

    def pretrained(self, targets: Any) -> Any:
        return {}

    def datasets(self) -> Any:
        return {}

    def evaluators(self) -> Any:
        return {}

    def loss(self, model: Patches, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        tower = model.tower(batch["image"].astype(jnp.float32) / 255, remat="full")
        errors = (model.head(tower.patches)[..., 0] - batch["target"]) ** 2
        loss = jnp.mean(errors) + jnp.mean(tower.embedding**2)
        return loss, {"large": jnp.mean(errors > 1, dtype=jnp.float32)}


class TokenTask(PatchTask):
    """A language model: the mean over predicted tokens."""

    shardings = SHARDINGS
    mean_over = "tokens"

    def init(self, key: jax.Array) -> nnx.Module:
        return Llama(tiny_llama.CONFIG, rngs=nnx.Rngs(params=key))

    def loss(self, model: Llama, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        hidden = model(batch["ids"], head=False, remat="full").tokens
        found = next_token_loss(hidden, model.logits, batch["labels"], chunk=4)
        return found.mean(), {"tokens": found.count, "right": found.correct / found.count}


class PairTask(PatchTask):
    """Compares rows with each other."""

    @property
    def mean_over(self) -> str:
        raise AttributeError  # it has none

    def loss(self, model: Patches, batch: Mapping[str, jax.Array], key: jax.Array) -> Any:
        embedding = unit(model.tower(batch["image"].astype(jnp.float32) / 255).embedding)
        other = unit(batch["target"] @ jnp.ones((PATCHES, embedding.shape[1])))
        return softmax_contrastive(embedding, other, jnp.float32(10)), {}


def made_batch(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Rows of which the first quarter predicts far more tokens than the others."""
    rng = np.random.default_rng(seed)
    share = np.where(np.arange(rows) < rows // 4, 0.95, 0.3)
    ids = rng.integers(3, 40, (rows, TOKENS)).astype(np.int32)
    return {
        "image": rng.integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8),
        "target": rng.normal(size=(rows, PATCHES)).astype(np.float32),
        "ids": ids,
        "labels": np.where(rng.random(ids.shape) < share[:, None], ids, IGNORE).astype(np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step and its program."""

    step: TaskStep
    done: CompiledStep

    @classmethod
    def of(
        cls,
        make_task: Callable[[], PatchTask],
        sizes: Mapping[str, int],
        devices: Sequence[jax.Device],
        *,
        accumulate: int = 1,
        mean: str = "equal",
        rows: int = ROWS,
    ) -> Compiled:
        optim = {**OPTIM, "accumulate": accumulate, "accumulate_mean": mean}
        config = TrainConfig.from_mapping({"steps": UPDATES, "batch_size": rows, "optim": optim})
        mesh = mesh_lib.make_mesh(**sizes, devices=devices)
        batch = in_micro_batches(made_batch(rows=rows), accumulate)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        with jax.set_mesh(mesh):
            step = TaskStep.of(make_task(), config, mesh)
            return cls(step, step.trace(shapes).compile())

    def gradient_numbers(self) -> int:
        """Numbers of the gradient on each device."""
        placed = self.step.shardings.trainable
        return sum(
            int(np.prod(placed[path].shard_shape(leaf.shape)))
            for path, leaf in self.step.state.trainable.items()
        )

    def summed(self, *, once: bool) -> int:
        """Numbers of arrays that are summed over the copies once per update, or more often."""
        copies = self.step.mesh.shape["replica"]
        return sum(
            found.times // found.runs * int(np.prod(found.result.shape))
            for found in traffic.traffic(self.done.call, self.step.mesh.size)
            if found.kind in ("all-reduce", "reduce-scatter")
            and found.group % copies == 0
            and found.result.shape  # numbers are metrics
            and (found.runs == 1) == once
        )


@functools.cache
def compiled(
    make_task: Callable[[], PatchTask],
    mesh: str,
    accumulate: int = 1,
    mean: str = "equal",
    rows: int = ROWS,
) -> Compiled:
    sizes, devices = MESHES[mesh]
    options = {"accumulate": accumulate, "mean": mean, "rows": rows}
    return Compiled.of(make_task, sizes, jax.devices()[:devices], **options)


def train(
    make_task: Callable[[], PatchTask], mesh: str, accumulate: int = 1, mean: str = "equal"
) -> tuple[TrainState, list[dict[str, float]]]:
    """The state after `UPDATES` updates on the host, and the metrics of each."""
    found = compiled(make_task, mesh, accumulate, mean)
    step, done = found.step, found.done
    split = mesh_lib.batch_sharding(step.mesh, axis=int(accumulate > 1))
    state, history = step.init(), []
    for update in range(UPDATES):
        batch = in_micro_batches(made_batch(update), accumulate)
        state, metrics = done.call(state, jax.device_put(batch, split))
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state), history


def assert_same(found: Any, expected: Any) -> None:
    (state, history), (expected_state, expected_history) = found, expected
    assert int(state.step) == UPDATES
    for ours, theirs in zip(history, expected_history, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)
    for part in ("trainable", "ema"):
        ours, theirs = getattr(state, part), getattr(expected_state, part)
        for path in theirs:
            np.testing.assert_allclose(ours[path], theirs[path], atol=2e-6, err_msg=path)


@pytest.mark.parametrize("mesh", MESHES)
def test_micro_batches_are_the_whole_batch(mesh: str):
    """Clip, schedule, average and frozen leaves act once per update."""
    expected = train(PatchTask, "one")
    found = train(PatchTask, mesh, accumulate=4)
    assert_same(found, expected)
    _, history = expected
    assert [line["learning_rate"] for line in history] == pytest.approx([1, 1, 0.5])
    assert min(line["grad_norm"] for line in history) > OPTIM["clip_norm"]
    start = jax.device_get(compiled(PatchTask, "one").step.init())
    moved = {
        path
        for path, leaf in start.trainable.items()
        if np.abs(found[0].trainable[path] - leaf).max() > 1e-5
    }
    assert len(moved) > 10
    (fixed,) = start.frozen.items()
    np.testing.assert_array_equal(found[0].frozen[fixed[0]], fixed[1])


@pytest.mark.parametrize("mesh", ["one", pytest.param("copies", marks=pytest.mark.slow), "all"])
def test_token_means_are_those_of_all_tokens(mesh: str):
    expected = train(TokenTask, "one")
    assert_same(train(TokenTask, mesh, 4, "tokens"), expected)


def test_equal_means_weight_micro_batches_the_same_on_every_mesh():
    """Those of an update that counts few tokens weigh more than all tokens alike would."""
    equal = train(TokenTask, "one", 4, "equal")
    assert_same(train(TokenTask, "copies", 4, "equal"), equal)
    step = compiled(TokenTask, "one").step
    model = step.model.merge(step.init().trainable, {})
    parts = in_micro_batches(made_batch(), 4)
    loss = jax.jit(lambda batch: step.task.loss(model, batch, jax.random.key(0))[0])
    each = [float(loss(jax.tree.map(lambda x, m=m: x[m], parts))) for m in range(4)]
    (_, history), (_, whole) = equal, train(TokenTask, "one", 4, "tokens")
    np.testing.assert_allclose(history[0]["loss"], np.mean(each), rtol=1e-5)
    assert abs(history[0]["loss"] - whole[0]["loss"]) > 1e-3
    assert history[0]["tokens"] == (made_batch()["labels"][:, 1:] != IGNORE).sum()


def test_pairs_see_the_rows_of_their_micro_batch():
    (_, whole), (_, cut) = train(PairTask, "one"), train(PairTask, "one", 4)
    assert cut[0]["loss"] < whole[0]["loss"] - 0.5  # log of a quarter of the negatives
    assert_same(train(PairTask, "all", 4), train(PairTask, "one", 4))


def test_copies_are_reduced_once_per_update():
    found = compiled(PatchTask, "copies", 4)
    assert found.summed(once=True) >= found.gradient_numbers()
    assert found.summed(once=False) == 0
    # Where rows are compared with each other each micro-batch is reduced, layer by layer.
    coupled = compiled(PairTask, "copies", 4)
    assert coupled.summed(once=False) > 0.5 * coupled.gradient_numbers()


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    def temporaries(accumulate: int, rows: int) -> int:
        done = compiled(PatchTask, "fsdp", accumulate, rows=rows).done
        return done.call.memory_analysis().temp_size_in_bytes

    few, many = temporaries(2, 2 * 64), temporaries(8, 8 * 64)
    assert many < 1.02 * few + 4096
    assert temporaries(1, 8 * 64) > 2 * many


def test_flops_do_not_depend_on_the_number_of_micro_batches():
    whole = compiled(PatchTask, "one").done
    for mesh in ("one", "copies"):
        cut = compiled(PatchTask, mesh, 4).done
        assert cut.model_flops == whole.model_flops
        assert cut.hardware_flops == whole.hardware_flops


class Stream:
    """An endless dataset of one batch."""

    def __init__(self, batch: Mapping[str, np.ndarray]) -> None:
        self._batch = batch

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        return self._batch

    def get_state(self) -> int:
        return 0

    def set_state(self, state: int) -> None:
        pass


def test_micro_batches_are_consecutive_rows_on_every_mesh():
    number = np.arange(ROWS)
    for sizes, devices in MESHES.values():
        mesh = mesh_lib.make_mesh(**sizes, devices=jax.devices()[:devices])
        feed = BatchFeed(Stream({"number": number}), mesh, ROWS, accumulate=4)
        found = feed.next().arrays["number"]
        np.testing.assert_array_equal(found, number.reshape(4, -1))
        assert found.addressable_shards[0].data.shape == (4, 8 // mesh_lib.batch_shards(mesh))


def test_what_cannot_be_accumulated_is_said():
    with pytest.raises(ConfigError, match=r"optim.accumulate: expected a divisor of 32.*found 5"):
        TrainConfig.from_mapping({"steps": 1, "batch_size": 32, "optim": {"accumulate": 5}})
    mesh = mesh_lib.make_mesh()
    with pytest.raises(ConfigError, match=r"batch_size 32 in 8 micro-batches \(optim.accumulate\)"):
        mesh_lib.check_batch(mesh, 32, accumulate=8)
    with pytest.raises(ConfigError, match=r"the metric 'tokens', but .* returns \['large'\]"):
        compiled(PatchTask, "one", 4, "tokens")
