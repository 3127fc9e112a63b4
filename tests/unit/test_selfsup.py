"""Self-supervised towers: matched patches, features, what is measured, what an export keeps."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from perception_jax import api
from perception_jax.data.augment import ImageAugment
from perception_jax.data.processors import ImageProcessor
from perception_jax.data.records import MMVP_PATTERNS, Record
from perception_jax.errors import ConfigError, DataError
from perception_jax.evals.linear_probe import probe_accuracy, ridge
from perception_jax.models.params import flatten
from perception_jax.nn.towers import TowerOutput
from perception_jax.ops.losses import nt_xent, vicreg
from perception_jax.systems.selfsup.data import TwoViews, matches
from perception_jax.systems.selfsup.evaluate import (
    Concepts,
    PairDiscrimination,
    Probes,
    TowerFeatures,
)
from perception_jax.systems.selfsup.task import SelfSupConfig
from perception_jax.train import loop
from perception_jax.train.config import TrainConfig
from perception_jax.train.metrics import read_metrics
from tests import tiny_selfsup
from tests.arrays import drawn


def test_the_same_window_matches_every_patch_with_itself():
    index, mask = matches((3, 5, 20, 30), (3, 5, 20, 30), 4)
    np.testing.assert_array_equal(index, np.arange(16))
    assert mask.all()


def test_patches_match_where_the_second_window_shows_their_middle():
    # The second window is the right half of the first: its patches are half as wide.
    index, mask = matches((0, 0, 40, 40), (20, 0, 20, 40), 2)
    np.testing.assert_array_equal(mask, [False, True, False, True])
    np.testing.assert_array_equal(index[mask], [1, 3])  # middles at (30, 10) and (30, 30)
    index, mask = matches((0, 0, 40, 40), (0, 20, 10, 10), 4)  # below: middles at 5, 15, 25, 35
    assert mask.sum() == 1
    assert index[8] == 2 * 4 + 2  # (5, 25), the middle of the second window
    assert mask[8]


def test_views_are_changed_and_say_what_matches():
    record = tiny_selfsup.ColourSource()[0]
    found = tiny_selfsup.TRANSFORM(record, np.random.default_rng(0))
    (shapes,) = tiny_selfsup.task().batch_shapes()
    assert {key: (x.shape, x.dtype) for key, x in found.items()} == {
        key: (x.shape[1:], x.dtype) for key, x in shapes.items()
    }
    assert (found["image"] != found["second_image"]).any()
    assert 0 < found["match_mask"].sum() <= 16
    again = tiny_selfsup.TRANSFORM(record, np.random.default_rng(0))
    assert all((found[key] == again[key]).all() for key in found)


def batch_of(task):
    batch = next(iter(task.datasets()["train"]))
    (shapes,) = task.batch_shapes()
    return {key: jnp.asarray(batch[key]) for key in shapes}


def test_the_loss_weighs_images_and_matched_patches():
    task = tiny_selfsup.task(dense=0.25, invariance=2.0, variance=3.0, covariance=0.5)
    model = drawn(lambda: task.init(jax.random.key(0)))
    batch = batch_of(task)
    loss, metrics = jax.jit(task.loss)(model, batch, jax.random.key(0))
    weights = {"invariance": 2.0, "variance": 3.0, "covariance": 0.5}
    whole = sum(weight * float(metrics[name]) for name, weight in weights.items())
    patches = sum(weight * float(metrics[f"patch_{name}"]) for name, weight in weights.items())
    assert float(loss) == pytest.approx(0.75 * whole + 0.25 * patches, rel=1e-5)

    features = jax.jit(task.features)(model, batch, jax.random.key(0))
    index, mask = (np.asarray(batch[key]) for key in ("match_index", "match_mask"))
    swapped = {
        **batch,
        "image": batch["second_image"],
        "match_index": jnp.broadcast_to(jnp.arange(16), index.shape),
    }
    plain = jax.jit(task.features)(model, swapped, jax.random.key(0))["image_patches"]
    wanted = np.take_along_axis(np.asarray(plain), index[..., None], axis=1)
    np.testing.assert_allclose(features["second_image_patches"], wanted, atol=1e-5)
    squared = np.square(np.asarray(features["image_patches"]) - wanted).mean(axis=-1)
    assert float(metrics["patch_invariance"]) == pytest.approx(squared[mask].mean(), rel=1e-5)


def test_each_image_of_a_record_has_two_views_and_its_mirror_image_if_asked():
    record = tiny_selfsup.ColourSource()[0]
    both = Record(id="both", images=(record.image, record.image[::-1].copy()))
    transform = dataclasses.replace(tiny_selfsup.MIRRORED, images=2)
    found = transform(both, np.random.default_rng(0))
    assert found["image"].shape == found["second_image"].shape == (4, 16, 16, 3)
    for views in (found["image"], found["second_image"]):
        np.testing.assert_array_equal(views[1::2], views[::2, :, ::-1])
    # What matches is the first image's, and drawn as for it alone.
    alone = tiny_selfsup.TRANSFORM(record, np.random.default_rng(0))
    np.testing.assert_array_equal(found["image"][0], alone["image"][0])
    for name in ("match_index", "match_mask"):
        np.testing.assert_array_equal(found[name], alone[name])
    with pytest.raises(DataError, match="both: expected 1 images, found 2"):
        tiny_selfsup.TRANSFORM(both, np.random.default_rng(0))


def test_images_of_a_record_are_rows_and_patches_are_drawn_among_matched_ones_of_the_first():
    task = tiny_selfsup.task(name="nt_xent", transform=tiny_selfsup.MIRRORED, patches=3)
    model = drawn(lambda: task.init(jax.random.key(0)))
    batch = batch_of(task)
    grid = np.arange(16).reshape(4, 4)
    # The first view is the right half of the second one, two columns further left in it.
    index = np.where(grid % 4 < 2, grid + 2, 0)
    batch |= {
        "match_index": jnp.tile(index.ravel(), (16, 1)),
        "match_mask": jnp.tile(grid.ravel() % 4 < 2, (16, 1)),
    }
    drawn_places = [np.asarray(task._drawn(batch["match_mask"], jax.random.key(k))) for k in (0, 1)]
    assert all(np.isin(places, grid[:, :2]).all() for places in drawn_places)
    assert (drawn_places[0] != drawn_places[1]).any()
    assert all(len(set(row)) == 3 for row in drawn_places[0])

    @jax.jit
    def both(model, batch, key):
        plain = tiny_selfsup.task().features
        alone = [
            plain(
                model,
                {
                    "match_index": jnp.tile(grid.ravel(), (16, 1)),
                    "match_mask": batch["match_mask"],
                    **{name: batch[name][:, k : k + 1] for name in ("image", "second_image")},
                },
                key,
            )
            for k in (0, 1)
        ]
        return task.features(model, batch, key), *alone

    features, plain, mirror = both(model, batch, jax.random.key(0))
    for name in ("image", "second_image"):
        rows = np.stack([plain[name], mirror[name]], axis=1).reshape(32, -1)
        np.testing.assert_allclose(features[name], rows, atol=1e-5)
    assert features["match_mask"].shape == (16, 3)
    assert features["match_mask"].all()

    def places(name):
        """Which patches of the first record's first image the features are."""
        found = np.asarray(features[name])[0][:, None]
        return np.abs(found - np.asarray(plain[name])[0]).max(axis=-1).argmin(axis=1)

    one, two = places("image_patches"), places("second_image_patches")
    assert set(one) == set(drawn_places[0][0])
    np.testing.assert_array_equal(two, one + 2)


def test_images_of_a_record_are_negatives_across_views():
    """By hand: two records of two images at right angles, views equal."""
    task = tiny_selfsup.task(name="nt_xent", transform=tiny_selfsup.MIRRORED, temperature=1.0)
    image = jnp.eye(4)
    patches = jnp.eye(4).reshape(2, 2, 4)
    features = {"image": image, "second_image": image, "match_mask": jnp.ones((2, 2), bool)}
    features |= {"image_patches": patches, "second_image_patches": patches}
    _, found = task.loss_of(nnx.Module(), features)
    # Of the 7 other rows, that of the record's other image in the same view is left out.
    assert float(found["contrast"]) == pytest.approx(np.log(np.e + 5) - 1)
    assert float(found["patch_contrast"]) == pytest.approx(np.log(np.e + 5) - 1)


def test_training_lowers_the_loss_and_does_not_collapse(tmp_path):
    config = TrainConfig.from_mapping(
        {
            "steps": 40,
            "batch_size": 16,
            "log_every": 1,
            "checkpoint_every": 0,
            "optim": {"learning_rate": 1e-2},
        }
    )
    loop.run(tiny_selfsup.task(), config, tmp_path, devices=jax.devices()[:1])
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["patch_variance"] < rows[0]["patch_variance"]


def test_an_export_is_the_tower_without_projectors(tmp_path):
    task = tiny_selfsup.task()
    model = drawn(lambda: task.init(jax.random.key(0)))
    processor = api.Processor(image=ImageProcessor(size=16), tokenizer=None)
    whole = api.Loaded(model=model.tower, config=tiny_selfsup.CONFIG, processor=processor)
    api.export(whole, tmp_path / "hf")
    back = api.load(tmp_path / "hf")
    assert back.config == tiny_selfsup.CONFIG
    kept = flatten(back.model)
    assert not [path for path in kept if "projector" in path]
    tower = {
        path.removeprefix("tower/"): leaf
        for path, leaf in flatten(model).items()
        if path.startswith("tower/")
    }
    assert kept.keys() == tower.keys()
    assert all((np.asarray(kept[path]) == np.asarray(leaf)).all() for path, leaf in tower.items())


def test_a_start_gives_the_tower_and_not_the_projectors(tmp_path):
    task = tiny_selfsup.task()
    tower = drawn(lambda: task.init(jax.random.key(0))).tower
    processor = api.Processor(image=ImageProcessor(size=16), tokenizer=None)
    start = api.Loaded(model=tower, config=tiny_selfsup.CONFIG, processor=processor, name="t")
    api.export(start, tmp_path)
    shapes = flatten(nnx.eval_shape(lambda: task.init(jax.random.key(0))))
    found = tiny_selfsup.task(start=api.prepare(tmp_path)).pretrained(shapes)
    assert found.keys() == {path for path in shapes if path.startswith("tower/")}
    for path, leaf in flatten(tower).items():
        np.testing.assert_array_equal(found[f"tower/{path}"], leaf)
    other = dataclasses.replace(start, config=dataclasses.replace(start.config, depth=3))
    with pytest.raises(ConfigError, match=r"start: t is Dinov2Config\(.*depth=3"):
        tiny_selfsup.task(start=other)


class Places(nnx.Module):
    """A tower whose tokens say where the image differs from its border, and no more."""

    prefix = 1

    def __call__(self, pixels):
        border = jnp.median(pixels[:, 0], axis=1)[:, None, None]
        mass = jnp.square(jnp.abs(pixels - border).sum(axis=-1)) + 1e-3
        along = jnp.linspace(-1.0, 1.0, pixels.shape[1])
        total = mass.sum(axis=(1, 2))
        x, y = (mass @ along).sum(axis=1) / total, (along @ mass).sum(axis=1) / total
        place = jnp.stack([x, y, jnp.ones_like(x)], axis=1)
        # The first one is no patch; the patches differ, and their mean is the place.
        steps = jnp.arange(-1.5, 2.0)[None, :, None]
        tokens = jnp.concatenate([-place[:, None], place[:, None] + steps], axis=1)
        return TowerOutput(embedding=place, pooled=place, tokens=tokens)


def test_probes_find_what_tokens_say_and_floors_do_not():
    features = TowerFeatures(ImageProcessor(size=24), batch_size=32)
    probes = Probes(features, learned=160, tested=60)
    found, floors = probes(Places()), probes.floors()
    assert found.keys() == floors.keys() == {"direction", "side", "height", "colour"}
    for name in ("side", "height"):
        assert found[name] > floors[name] + 0.15, (name, found, floors)
    assert found["colour"] < 0.5
    tokens = probes._tokens(Places(), "test", None)
    _, items = probes._parts["test"]
    for k, item in enumerate(items):
        x, y = ((item.box[axis] + item.box[axis + 2]) / 2 >= 12 for axis in (0, 1))
        step = tokens["centre"][k] - tokens["mean"][k]
        np.testing.assert_allclose(step, x + 2 * y - 1.5, atol=1e-5)
    concepts = Concepts(features, names=6, per_name=1)
    for rates in (concepts(Places()), concepts.floors()):
        assert 0 <= rates["top1"] <= rates["top5"] <= 1


class MeanColour(nnx.Module):
    """A tower whose embedding is the image's mean colour, and no more."""

    prefix = 0

    def __call__(self, pixels):
        colour = pixels.mean(axis=(1, 2))
        return TowerOutput(embedding=colour, pooled=colour, tokens=colour[:, None])


def test_pairs_are_told_apart_by_what_the_embedding_says():
    features = TowerFeatures(ImageProcessor(size=24), batch_size=32)
    transform = TwoViews(
        processor=ImageProcessor(size=24), augment=ImageAugment(brightness=0.02), grid=2, images=2
    )
    pairs = PairDiscrimination(features, transform, per_pattern=8)
    found, floors = pairs(MeanColour()), pairs.floors()
    assert list(found) == list(floors) == ["accuracy", *MMVP_PATTERNS]
    assert found["accuracy"] == pytest.approx(np.mean([found[name] for name in MMVP_PATTERNS]))
    assert found["colour"] > 0.9 > found["orientation"]
    assert min(floors.values()) >= 0.5
    # By hand: one pair of each pattern, the angles of its first views, and of its second ones.
    pairs._views = np.zeros((9, 2, 2, 1, 1, 3), np.uint8)
    angles = np.array([0.0, 1.0, 0.4, 0.6])
    rows = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert set(pairs._rates(np.tile(rows, (9, 1))).values()) == {1.0}
    assert set(pairs._rates(np.tile(rows[[0, 1, 3, 2]], (9, 1))).values()) == {0.0}


def test_a_ridge_probe_separates_what_is_linear_and_needs_labels():
    rng = np.random.default_rng(0)
    given, tested = rng.normal(size=(200, 5)), rng.normal(size=(50, 5))
    labels, wanted = ([str(row[2] > 0) for row in rows] for rows in (given, tested))
    assert probe_accuracy(given, labels, tested, wanted) > 0.9
    exact = ridge(given, given @ np.ones((5, 1)), strength=1e-6)
    np.testing.assert_allclose(exact(tested), tested.sum(axis=1, keepdims=True), atol=1e-4)
    with pytest.raises(DataError, match="found 200 and 0"):
        probe_accuracy(given, labels, tested[:0], [])


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dense", 1.5, r"0 to 1, found 1\.5"),
        ("name", "simclr", "'nt_xent' or 'vicreg', found 'simclr'"),
        ("temperature", 0.0, r"more than 0, found 0\.0"),
    ],
)
def test_settings_of_the_loss_are_checked(name, value, expected):
    with pytest.raises(ConfigError, match=rf"SelfSupConfig\.{name}: expected {expected}"):
        SelfSupConfig(**{name: value})


def by_hand(one, two):
    """VICReg's terms in loops."""
    width = one.shape[1]
    terms = {"invariance": np.square(one - two).mean(), "variance": 0.0, "covariance": 0.0}
    for x in (one, two):
        covariance = np.cov(x, rowvar=False)
        for i in range(width):
            terms["variance"] += max(0.0, 1 - np.sqrt(covariance[i, i] + 1e-4)) / width / 2
            for j in range(width):
                if i != j:
                    terms["covariance"] += covariance[i, j] ** 2 / width
    return terms


def test_vicreg_equals_loops():
    rng = np.random.default_rng(0)
    one, two = rng.normal(0, 0.7, (2, 6, 4)).astype(np.float32)
    found = jax.jit(vicreg)(one, two)
    assert {name: float(x) for name, x in found.items()} == pytest.approx(by_hand(one, two))
    # By hand: two rows, two columns that move together.
    pair = jnp.array([[0.0, 0.0], [1.0, 1.0]])
    found = jax.jit(vicreg)(pair, pair)
    assert float(found["invariance"]) == 0.0
    assert float(found["covariance"]) == pytest.approx(0.5)  # 2 views × 2 pairs × 0.5² / 2
    assert float(found["variance"]) == pytest.approx(1 - np.sqrt(0.5 + 1e-4))


def test_vicreg_leaves_masked_rows_out():
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    mask = rng.random((3, 4)) < 0.6
    found = jax.jit(vicreg)(one, two, mask=mask)
    assert {name: float(x) for name, x in found.items()} == pytest.approx(
        by_hand(one[mask], two[mask]), rel=1e-4
    )


def test_nt_xent_equals_loops():
    rng = np.random.default_rng(2)
    one, noise = rng.normal(size=(2, 2, 4, 5)).astype(np.float32)
    two = one + noise
    mask = np.array([[1, 1, 0, 1], [1, 0, 1, 1]], bool)
    groups = np.array([[0, 0, 0, 1], [1, 2, 2, 3]])
    found = jax.jit(nt_xent, static_argnums=2)(one, two, 0.3, mask=mask, groups=groups)
    rows = np.concatenate([one[mask], two[mask]])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    half, losses, right = len(rows) // 2, [], []
    group = np.tile(groups[mask], 2)
    for i in range(2 * half):
        within = [k for k in range(2 * half) if k // half == i // half and group[k] == group[i]]
        cosines = {k: rows[i] @ rows[k] / 0.3 for k in range(2 * half) if k not in within}
        other = (i + half) % (2 * half)
        losses.append(np.log(sum(map(np.exp, cosines.values()))) - cosines[other])
        right.append(max(cosines, key=cosines.get) == other)
    assert float(found["contrast"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(found["recognised"]) == pytest.approx(np.mean(right))
    assert 0 < np.mean(right) < 1
    # By hand: two rows at right angles, equal views; 1 of 3 cosines is 1.
    found = jax.jit(nt_xent, static_argnums=2)(jnp.eye(2), jnp.eye(2), 1.0)
    assert float(found["contrast"]) == pytest.approx(np.log(np.e + 2) - 1)
