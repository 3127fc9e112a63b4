"""The plus profile, held batches and objects one a line."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from perception_jax.data.augment import ImageAugment
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.scenes import objects as scenes
from perception_jax.data.sources.objects import ObjectLines
from perception_jax.data.tokenization import ClipTokenizer
from perception_jax.errors import ConfigError, DataError
from perception_jax.ops.boxes import patch_coverage
from perception_jax.ops.losses import softmax_contrastive, unit
from perception_jax.systems.give import plus
from perception_jax.systems.give.plus import PlusConfig
from perception_jax.systems.give.sampler import BatchPlanner, GroupConfig
from perception_jax.systems.give.task import GiveTask, GiveTaskConfig
from perception_jax.systems.give.training_data import ATTRIBUTES, TrainingData, altered
from tests import tiny_give_task


def test_coverage_is_the_share_of_each_patch():
    boxes = jnp.array([[0.0, 0.0, 8.0, 4.0], [2.0, 2.0, 6.0, 14.0], [0.0, 0.0, 0.0, 0.0]])
    found = patch_coverage(boxes, (4, 2), 16)  # patches of 8 x 4 pixels
    np.testing.assert_allclose(found[0], [1, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(found[1], [0.25, 0, 0.5, 0, 0.5, 0, 0.25, 0])
    assert not found[2].any()


def test_dense_loss_is_least_where_the_object_is():
    covered = jnp.array([[1.0, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    quiet = jnp.full((2, 4), -20.0)

    def of_present(logits):
        return float(plus.dense_loss(jnp.array([logits, [0.0] * 4]), quiet, covered))

    best = of_present([np.log(2 / 3), np.log(1 / 3), -20.0, -20.0])
    entropy = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    assert best == pytest.approx(entropy, abs=1e-5)  # the row without a box does not count
    assert of_present([0.0] * 4) == pytest.approx(np.log(4), abs=1e-5)
    loud = quiet.at[1, 2].set(3.0)
    more = float(plus.dense_loss(jnp.zeros((2, 4)), loud, covered))
    assert more - np.log(4) == pytest.approx(np.log1p(np.exp(3.0)) / 2, abs=1e-5)


def test_a_harder_text_only_adds_to_the_image_side():
    rng = np.random.default_rng(0)
    image, text = (unit(jnp.asarray(rng.normal(size=(5, 8)))) for _ in range(2))
    plain = softmax_contrastive(image, text, jnp.float32(4.0))
    nothing = jnp.full((5, 1), -jnp.inf)
    assert softmax_contrastive(image, text, jnp.float32(4.0), harder=nothing) == plain
    harder = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
    logits = 4.0 * jnp.concatenate([image @ text.T, harder], axis=1)
    rows = jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)
    own = 4.0 * image @ text.T
    columns = jax.nn.logsumexp(own, axis=0) - jnp.diagonal(own)
    found = softmax_contrastive(image, text, jnp.float32(4.0), harder=harder)
    np.testing.assert_allclose(found, 0.5 * (rows.mean() + columns.mean()), rtol=1e-5)


def test_altered_captions_differ_in_one_word_of_one_group():
    caption = "a small red cat on the left of the picture"
    changed = altered(caption)
    differing = [(a, b) for a, b in zip(caption.split(), changed.split(), strict=True) if a != b]
    assert len(differing) == 1
    assert set(differing[0]) <= set(ATTRIBUTES[0])
    assert altered(caption) == changed
    assert altered("a small cat") in {f"a {word} cat" for word in ATTRIBUTES[1] if word != "small"}
    assert altered("a leftover cat") == ""


def training_rows(**options) -> TrainingData:
    shown = scenes.ObjectScenesConfig(canvas=32, names=scenes.names(12), unnamed=True)
    source = scenes.training_scenes(shown, seed=3, length=30)
    common = {
        "processor": ImageProcessor(size=24),
        "tokenizer": ClipTokenizer.shipped(1024, 16),
    }
    config = GroupConfig(groups=3, images=2, seed=5)
    return TrainingData(source, config, altered=True, **common, **options)


@pytest.fixture(scope="module", params=[None, ImageAugment(brightness=0.5, bits=4)])
def rows(request):
    return [training_rows(hold=hold, augment=request.param) for hold in (False, True)]


def test_held_batches_equal_those_read_row_by_row(rows):
    read, held = (data.loader(batch_size=12) for data in rows)
    for number, (one, other) in enumerate(zip(read, held, strict=False)):
        assert set(one) == set(other)
        for name in set(one) - {"id"}:
            np.testing.assert_array_equal(one[name], other[name], err_msg=f"{number} {name}")
        if number == 2:
            break


def test_hosts_share_a_held_batch(rows):
    whole = next(iter(rows[1].loader()))
    parts = [next(iter(rows[1].loader(host=(k, 2)))) for k in range(2)]
    for name in whole:
        joined = np.empty_like(whole[name])
        joined[0::2], joined[1::2] = parts[0][name], parts[1][name]
        np.testing.assert_array_equal(joined, whole[name], err_msg=name)


def test_boxes_follow_the_mirror(rows):
    batch = next(iter(rows[1].loader()))
    data = rows[1]
    plan = data.planner.plan(0, 0)
    for k, (place, flip) in enumerate(zip(plan["object"], plan["flip"], strict=True)):
        record, _ = data[k]
        left, _, right, _ = (x * 24 / 32 for x in record.objects[place].box)
        expected = (24 - right, 24 - left) if flip else (left, right)
        np.testing.assert_allclose(batch["boxes"][k, 0, [0, 2]], expected, atol=1e-4)
    assert plan["flip"].any()
    assert not plan["flip"].all()


def test_each_row_changes_its_image_in_its_own_way():
    plain, changed = (
        next(iter(training_rows(hold=True, augment=augment).loader()))
        for augment in (None, ImageAugment(brightness=0.5))
    )
    for name in set(plain) - {"image"}:
        np.testing.assert_array_equal(plain[name], changed[name], err_msg=name)
    light = changed["image"].mean((1, 2, 3)) / plain["image"].mean((1, 2, 3))
    assert len(set(light.tolist())) == 12
    assert np.abs(light - 1).max() < 0.51


def test_rows_without_boxes_are_no_data_for_the_dense_term():
    moved = training_rows(augment=ImageAugment(warp=0.1))
    arrays = moved[0][1]
    assert not arrays["box_mask"].any()
    assert not arrays["boxes"].any()
    config = GiveTaskConfig(batch_size=12, plus=PlusConfig(dense=1.0))
    with pytest.raises(ConfigError, match=r"plus\.dense reads the objects' boxes"):
        GiveTask(config, tiny_give_task.make_task().backbone, moved)


def test_random_rows_are_as_many(rows):
    data = rows[0]
    config = dataclasses.replace(data.planner.config, grouped=False)
    planner = BatchPlanner(data.index, config)
    kinds = [planner.plan(0, step)["label"] for step in range(20)]
    assert all(len(kind) == 12 for kind in kinds)
    assert max(len(set(kind.tolist())) for kind in kinds) > 6  # grouped: three, and their partners


def write_lines(folder, *lines):
    Image.new("RGB", (20, 10)).save(folder / "a.png")
    path = folder / "objects.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_objects_one_a_line(tmp_path):
    path = write_lines(
        tmp_path,
        {"image": "a.png", "class": "Red_kite", "caption": "a kite", "box": [1, 2, 5, 6]},
        {"image": "b.png", "class": "dog", "caption": "a dog"},
        {"image": "a.png", "class": "dog", "caption": "it barks", "instruction": "the barker"},
    )
    source = ObjectLines(path)
    assert len(source) == 2
    record = source[0]
    assert [one.name for one in record.objects] == ["red kite", "dog"]
    assert record.objects[0].box == (1.0, 2.0, 5.0, 6.0)
    assert record.objects[1].box is None
    assert [(one.text, one.target) for one in record.instructions] == [("the barker", 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "a.png", "class": "dog"}, r"objects.jsonl:1: expected the key 'caption'"),
        (
            {"image": "a.png", "klass": "dog", "caption": "x"},
            r"unknown key 'klass'. Did you mean class",
        ),
        (
            {"image": "a.png", "class": "dog", "caption": "x", "box": [0, 0, 30, 5]},
            r"leaves the image of 20×10",
        ),
    ],
)
def test_faults_of_a_line_are_named(tmp_path, line, message):
    path = write_lines(tmp_path, line)
    with pytest.raises(DataError, match=message):
        ObjectLines(path)[0]
