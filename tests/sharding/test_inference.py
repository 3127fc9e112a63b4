"""A model over many rows: split over a mesh in the compiled program, equal on any mesh."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from perception_jax.data.processors import ImageProcessor
from perception_jax.errors import ConfigError, DataError
from perception_jax.inference.batches import Batched, divisible
from perception_jax.models.clip.modeling import Clip
from perception_jax.models.params import flatten, unflatten
from perception_jax.models.shardings import SHARDINGS
from perception_jax.shard import distributed, program, rules
from perception_jax.shard import mesh as mesh_lib
from perception_jax.systems.contrastive.encode import Encoder
from perception_jax.testing import tiny_clip
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig

SIDE, BATCH = tiny_clip.SIZE, 56
ROW = jax.ShapeDtypeStruct((SIDE, SIDE, 3), np.uint8)


def encoder(batch_size: int) -> Encoder:
    return Encoder(ImageProcessor(size=SIDE), tiny_clip.PROCESSOR.tokenizer, batch_size=batch_size)


def require_split(one: Encoder, model: Clip, mesh: jax.sharding.Mesh) -> None:
    """No array of the compiled program holds the rows of the whole batch for a layer."""
    found = set(program.results(one._image.lower(model, ROW, mesh).compile()))
    shards = mesh_lib.batch_shards(mesh)
    assert any(BATCH // shards in result.shape for result in found)
    assert not [result for result in found if len(result.shape) >= 3 and BATCH in result.shape]


def test_a_function_of_rows_gives_the_same_in_any_batches():
    rows = np.arange(30, dtype=np.float32).reshape(10, 3)
    for size in (1, 3, 10, 64):
        run = Batched(lambda scale, part: {"twice": scale * part}, batch_size=size)
        np.testing.assert_array_equal(run(2.0, rows)["twice"], 2 * rows)
        assert run._on(None).jitted._cache_size() == 1
    with pytest.raises(DataError, match="at least one row"):
        run(2.0, rows[:0])
    with pytest.raises(ConfigError, match="at least 1, found 0"):
        Batched(lambda scale, part: part, batch_size=0)


def test_processes_leave_after_the_same_call_once_one_wants_to():
    mesh = mesh_lib.make_mesh(1, 8, 1)
    run = Batched(lambda scale, part: scale * part, batch_size=8)
    rows = np.arange(48, dtype=np.float32)[:, None]
    answers, started = [False] * 6 + [False, True, False, False], []

    def parts():
        for start in range(0, 48, 8):
            started.append(start)
            yield rows[start : start + 8]

    poll = distributed.Poll(
        distributed.Ballots(mesh, needed=True), lambda: answers.pop(0), KeyboardInterrupt
    )
    with distributed.polling(poll):
        np.testing.assert_array_equal(run.stream(2.0, parts(), mesh), 2 * rows)
        started.clear()
        with pytest.raises(KeyboardInterrupt):
            run.stream(2.0, parts(), mesh)
    assert started == [0, 8, 16, 24]  # the second was fetched after the fourth had started
    np.testing.assert_array_equal(run.stream(2.0, parts(), mesh), 2 * rows)  # nobody asks


def test_an_encoder_on_a_mesh_splits_its_batch_and_gives_the_same():
    model = jax.jit(lambda: Clip(tiny_clip.CONFIG, rngs=nnx.Rngs(params=0)))()
    source = tiny_clip.ColourSource(20)
    pixels = np.stack([source[k].image for k in range(20)])
    expected = encoder(7).images(model, pixels)
    mesh = mesh_lib.make_mesh(2, 2, 2)
    leaves = flatten(model)
    placed = unflatten(model, jax.device_put(leaves, rules.shardings(leaves, SHARDINGS, mesh)))
    assert mesh_lib.mesh_of(placed) == mesh
    one = encoder(BATCH)
    np.testing.assert_allclose(one.images(placed, pixels, mesh), expected, atol=1e-5)
    np.testing.assert_allclose(encoder(6).images(placed, pixels), expected, atol=1e-5)
    require_split(one, placed, mesh)


def test_evaluation_inside_training_splits_its_batch(tmp_path):
    task, one, meshes = tiny_clip.task(), encoder(BATCH), []
    pixels = np.stack([task.data.examples(0).source[k].image for k in range(8)])

    def evaluator(model: Clip, mesh: jax.sharding.Mesh) -> dict[str, float]:
        meshes.append(mesh)
        require_split(one, model, mesh)
        return {"first": float(one.images(model, pixels, mesh)[0, 0])}

    task.evaluators = lambda: {"images": evaluator}
    config = TrainConfig.from_mapping(
        {"steps": 1, "batch_size": 16, "mesh": {"replica": 2, "fsdp": 4}, "checkpoint_every": 0}
    )
    result = loop.run(task, config, tmp_path)
    assert [mesh.size for mesh in meshes] == [8]
    assert np.isfinite(result.metrics["evaluate/images/first"])


def test_a_batch_size_becomes_a_multiple_of_the_shards():
    mesh = mesh_lib.make_mesh(2, 2, 2)
    assert [divisible(size, mesh) for size in (1, 4, 5, 64)] == [4, 4, 8, 64]
    assert divisible(5, None) == 5
