"""Scenes as a source of records: identity, determinism, attributes, errors."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle

import numpy as np
import pytest

from perception_jax.data.records import Record
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.source import ScenesSource, portrait
from perception_jax.errors import ConfigError, DataError

SOURCE = ScenesSource(SceneConfig(canvas=64), seed=7, length=200)


def digest(record: Record) -> str:
    parts = [record.id, record.captions, record.questions, record.referring, record.instructions]
    parts += [record.absent, [(o.name, o.box, o.caption, o.attributes) for o in record.objects]]
    masks = b"".join(np.packbits(o.mask).tobytes() for o in record.objects)
    return hashlib.sha256(repr(parts).encode() + record.image.tobytes() + masks).hexdigest()


def digest_of(source: ScenesSource, index: int) -> str:
    return digest(source[index])


def test_the_index_alone_decides_in_any_order_and_process() -> None:
    indices = [5, 0, 199, 42]
    here = [digest_of(SOURCE, k) for k in indices]
    again = [digest_of(pickle.loads(pickle.dumps(SOURCE)), k) for k in reversed(indices)]
    assert again[::-1] == here
    context = multiprocessing.get_context("forkserver")
    with context.Pool(1) as pool:
        assert pool.starmap(digest_of, [(SOURCE, k) for k in indices]) == here


def test_other_seeds_give_other_scenes() -> None:
    other = ScenesSource(SOURCE.config, seed=8, length=200)
    assert digest_of(SOURCE, 0) != digest_of(other, 0)


def test_ids_and_bounds() -> None:
    assert SOURCE[123].id == "scenes-train-7-000123"
    assert len({SOURCE[k].id for k in range(20)}) == 20
    for index in (-1, 200):
        with pytest.raises(IndexError, match=f"scene {index} of 200"):
            SOURCE[index]


def test_attributes_are_known_words() -> None:
    seen: dict[str, set[str]] = {}
    for k in range(60):
        for item in SOURCE[k].objects:
            for key, value in item.attributes.items():
                seen.setdefault(key, set()).add(value)
    assert seen["size"] == {"tiny", "small", "medium", "large", "huge"}
    assert seen["facing"] == {"left", "right"}
    assert {"left", "right", "top", "bottom", "top left"} <= seen["position"]
    assert {"red", "blue", "green"} <= seen["colour"]
    assert "twemoji" not in seen["style"]


def test_sizes_reach_from_two_percent_to_almost_full_frame() -> None:
    source = ScenesSource(SceneConfig(canvas=224, language="none"), seed=0, length=150)
    sides = [max(o.box[2] - o.box[0], o.box[3] - o.box[1]) / 224 for r in source for o in r.objects]
    assert min(sides) <= 0.025
    assert max(sides) >= 0.9


def test_single_scenes_have_one_large_object_without_text() -> None:
    source = ScenesSource(SceneConfig.single(canvas=32, split="held_out"), seed=0, length=20)
    for record in source:
        (item,) = record.objects
        assert max(item.box[2] - item.box[0], item.box[3] - item.box[1]) >= 0.4 * 32
        assert record.extras["spec"].text is None


def test_silent_records_carry_no_language() -> None:
    record = ScenesSource(SceneConfig(language="none"), seed=0, length=1)[0]
    assert record.captions == record.referring == record.questions == record.absent == ()
    assert record.objects
    assert all(item.caption == "" for item in record.objects)


def test_portraits_differ_by_seed_and_not_by_call() -> None:
    first = portrait("lion", "twemoji", (48, 64), 3)
    assert first.shape == (48, 64, 3)
    np.testing.assert_array_equal(first, portrait("lion", "twemoji", (48, 64), 3))
    assert (first != portrait("lion", "twemoji", (48, 64), 4)).mean() > 0.2
    with pytest.raises(DataError, match="Did you mean lion"):
        portrait("lionn", "twemoji", 64, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "validation"}, "split: train, test or held_out"),
        ({"count": (0, 3)}, "1 <= fewest"),
        ({"count": (2, 9)}, "most <= 8"),
        ({"size": (0.5, 0.2)}, "smallest <= largest"),
        ({"canvas": (8, 64)}, "at least 16"),
        ({"styles": ("twemoji",)}, "twemoji stays out of train"),
        ({"styles": ("oil",)}, "styles: out of"),
        ({"backgrounds": ()}, "backgrounds: out of"),
        ({"max_overlap": 0.6}, "1 - min_visible"),
    ],
)
def test_wrong_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SceneConfig(**changes)


def test_names_outside_the_split_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"split 'train', found \['lion'\]"):
        ScenesSource(SceneConfig(names=("lion", "cat")), seed=0, length=1)


def test_impossible_visibility_is_an_error_and_not_an_endless_search() -> None:
    config = SceneConfig(canvas=16, count=(4, 4), size=(0.9, 0.95), language="none")
    with pytest.raises(ConfigError, match="found none in 100 scenes"):
        ScenesSource(config, seed=0, length=1)[0]


def test_captions_alone_are_captions_and_nothing_else() -> None:
    record = ScenesSource(SceneConfig(canvas=64, language="captions"), seed=0, length=1)[0]
    assert len(record.captions) == 3
    assert (record.questions, record.referring, record.instructions) == ((), (), ())
