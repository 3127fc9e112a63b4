"""Kept features of images: by record, with several images, pickled, damaged."""

from __future__ import annotations

import json
import pathlib
import pickle

import numpy as np
import pytest

from perception_jax.data.kept_features import ARRAY, INDEX, FeaturesWriter, KeptFeatures
from perception_jax.errors import DataError

MADE = {"layer": 3}


def rows(*counts: int, shape=(4, 8)) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [(f"r{k}", rng.normal(size=(n, *shape))) for k, n in enumerate(counts)]


def images(count: int, grey: int = 0) -> np.ndarray:
    return np.full((count, 2, 2, 3), grey, np.uint8)


def keep(folder, given):
    with FeaturesWriter(folder, MADE) as writer:
        for identity, own in given:
            writer.add(identity, own, images(len(own)))
        return writer.finish()


def test_features_come_back_by_record(tmp_path):
    given = rows(1, 2, 1)
    kept = keep(tmp_path / "kept", given)
    for one in (kept, KeptFeatures(tmp_path / "kept"), pickle.loads(pickle.dumps(kept))):
        assert one.shape == (4, 8)
        assert one.made == MADE
        for name, features in given:
            np.testing.assert_array_equal(one[name], features.astype(np.float16))
        with pytest.raises(DataError, match="record 'r3', found none"):
            one["r3"]
    assert len(pickle.dumps(kept)) < 500


def test_features_of_other_images_are_refused(tmp_path):
    kept = keep(tmp_path, rows(1, 2))
    kept.compare("r0", images(1))
    kept.compare("r1", images(2))
    kept.compare("another", images(1))
    others = [
        ("r0", images(1, grey=1)),
        ("r1", images(1)),
        ("r1", np.zeros((2, 3, 3, 3), np.uint8)),
    ]
    for name, other in others:
        with pytest.raises(DataError, match=f"record '{name}', found those of others"):
            kept.compare(name, other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([*rows(1), ("r1", np.zeros((1, 5, 8)))], r"expected \[4, 8\]"),
        ([*rows(1), *rows(1)], "'r0' comes twice"),
        ([("r0", np.full((1, 4, 8), 1e6))], "within float16"),
        ([("r0", np.full((1, 4, 8), np.nan))], "within float16"),
        ([], "found none"),
    ],
)
def test_what_cannot_be_kept_leaves_no_index(tmp_path, given, message):
    keep(tmp_path, rows(1))
    with pytest.raises(DataError, match=message):
        keep(tmp_path, given)
    with pytest.raises(DataError, match="Start it again"):
        KeptFeatures(tmp_path)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path):
    (tmp_path / ARRAY).symlink_to("/dev/full")
    with pytest.raises(DataError, match="cannot be written"):
        keep(tmp_path, rows(1, 1, shape=(64, 512)))


def test_damaged_folders_are_named(tmp_path):
    keep(tmp_path, rows(1, 1))
    index = json.loads((tmp_path / INDEX).read_text())
    for wrong, message in (
        ({**index, "counts": [1, 2]}, "expected the features of 3 images"),
        ({**index, "counts": [2]}, "2 names and 2 checksums"),
        ({**index, "images": [1]}, "2 names and 1 checksums"),
        ({**index, "counts": ["1", 1]}, "lists of ids, counts and images"),
        ([], "lists of ids, counts and images"),
    ):
        (tmp_path / INDEX).write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=message):
            KeptFeatures(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    content = (tmp_path / ARRAY).read_bytes()
    (tmp_path / ARRAY).write_bytes(content[:-8])
    with pytest.raises(DataError, match="that can be read"):
        KeptFeatures(tmp_path)
    np.save(tmp_path / ARRAY, np.zeros((2, 4, 8), np.float32))
    with pytest.raises(DataError, match="expected float16"):
        KeptFeatures(tmp_path)
