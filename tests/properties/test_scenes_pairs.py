"""A minimal pair differs in what its pattern says only, in spec, pixels and words."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import numpy as np
import pytest

from perception_jax.data.records import MMVP_PATTERNS, MinimalPair
from perception_jax.data.scenes.edits import PairSpec
from perception_jax.data.scenes.pairs import PairSource, minimal_pair, minimal_pair_record
from perception_jax.data.scenes.render import Rendered, render
from perception_jax.data.scenes.sample import SceneConfig
from perception_jax.data.scenes.visibility import extent, text_extent
from perception_jax.errors import ConfigError
from tests import scenes_oracle as oracle

PAIRS = 25
CONFIG = SceneConfig(canvas=64)
TEST = SceneConfig(canvas=(64, 80), split="test")
FIELDS = {
    "orientation": {("flip",)},
    "state": {("concept",), ("angle",), ("opacity",)},
    "position": {("x",), ("y",)},
    "colour": {("tint",)},
    "structure": {("x", "y"), ("x",), ("y",)},
    "viewpoint": {("size",), ("concept",)},
}
"""What may differ of one placement, for the patterns that keep their number."""


def _pairs(pattern: str) -> list[tuple[PairSpec, SceneConfig]]:
    rng = np.random.default_rng(MMVP_PATTERNS.index(pattern))
    return [(minimal_pair(pattern, rng, c), c) for c in (CONFIG, TEST) for _ in range(PAIRS)]


@pytest.mark.parametrize("pattern", MMVP_PATTERNS)
def test_specs_differ_in_the_patterns_respect_only(pattern: str) -> None:
    for pair, _ in _pairs(pattern):
        first, second = pair.specs
        assert first.background == second.background
        if pattern == "text":
            word = second.text.text
            assert dataclasses.replace(first.text, text=word) == second.text != first.text
        else:
            assert [first.text, second.text] == [None, None]
        if pattern in ("presence", "count"):
            shorter, longer = sorted((first.placements, second.placements), key=len)
            (k,) = pair.changed
            assert longer[:k] + longer[k + 1 :] == shorter
            same = [p for p in shorter if p.concept == longer[k].concept]
            assert bool(same) == (pattern == "count")
            continue
        both = zip(first.placements, second.placements, strict=True)
        differing = {k: d for k, (a, b) in enumerate(both) if (d := _different_fields(a, b))}
        assert set(differing) <= set(pair.changed)
        assert bool(differing) == (pattern != "text")
        assert set(differing.values()) <= FIELDS.get(pattern, set())


@pytest.mark.parametrize("pattern", MMVP_PATTERNS)
def test_pixels_differ_inside_what_changed_only(pattern: str) -> None:
    for pair, config in _pairs(pattern)[::3]:
        drawn = [render(spec, config.shape) for spec in pair.specs]
        outside = ~(_region(pair, drawn, 0) | _region(pair, drawn, 1))
        different = (drawn[0].image != drawn[1].image).any(axis=-1)
        assert different.sum() >= 6, pair.statements
        assert not (different & outside).any(), pair.statements


@pytest.mark.parametrize("pattern", MMVP_PATTERNS)
def test_statements_and_answers_are_true_of_their_own_scene_only(pattern: str) -> None:
    for pair, config in _pairs(pattern):
        scenes = []
        for spec in pair.specs:
            rendered = render(spec, config.shape)
            assert all(item.visible > 0.99 for item in rendered.objects)
            scenes.append(oracle.scene_of(spec, rendered.objects, config.shape))
        for k, statement in enumerate(pair.statements):
            assert oracle.says(statement, scenes[k]), (statement, pair)
            assert not oracle.says(statement, scenes[1 - k]), (statement, pair)
            assert not re.search(r"\ba [aeio]|  |\bone \w+s\b", statement), statement
        assert pair.answers[0] != pair.answers[1]
        assert _told_by(pair.statements[0], pair.answers[0])
        assert _told_by(pair.statements[1], pair.answers[1])


def test_records_carry_both_scenes_and_the_right_answers() -> None:
    source = PairSource(CONFIG, seed=5, length=2 * len(MMVP_PATTERNS))
    pairs = [source[k] for k in range(len(source))]
    assert [pair.pattern for pair in pairs] == [*MMVP_PATTERNS, *MMVP_PATTERNS]
    for pair in pairs:
        assert set(pair.options) == set(pair.answers)
        for record in pair.records:
            assert record.image.shape == (64, 64, 3)
            assert all([record.captions, record.objects, record.questions])
    assert len({record.id for pair in pairs for record in pair.records}) == 2 * len(pairs)


def test_the_same_index_gives_the_same_pair_whatever_was_read_before() -> None:
    first = PairSource(CONFIG, seed=5, length=18)
    again = minimal_pair_record("count", CONFIG, seed=5, index=12)
    assert _shown(first[12]) == _shown(again)
    assert _shown(first[12]) != _shown(PairSource(CONFIG, seed=6, length=18)[12])


def test_neither_the_first_option_nor_the_first_scene_gives_the_answer_away() -> None:
    rng = np.random.default_rng(0)
    first = Counter(minimal_pair("presence", rng, CONFIG).answers[0] for _ in range(300))
    assert 0.4 < first["yes"] / 300 < 0.6
    pairs = [minimal_pair_record("colour", CONFIG, seed=1, index=k) for k in range(40)]
    assert 0.25 < np.mean([pair.options == pair.answers for pair in pairs]) < 0.75


def test_what_cannot_be_shown_is_refused_with_a_reason() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="orientation, presence"):
        minimal_pair("colours", rng, CONFIG)
    with pytest.raises(ConfigError, match=r"side that it faces.*1 concepts"):
        minimal_pair("orientation", rng, SceneConfig(canvas=64, names=("anchor",)))
    with pytest.raises(ConfigError, match="another thing"):
        minimal_pair("presence", rng, SceneConfig(canvas=64, names=("anchor",)))
    with pytest.raises(ConfigError, match="seed=-1"):
        PairSource(CONFIG, seed=-1, length=3)
    with pytest.raises(ConfigError, match="another thing"):
        PairSource(SceneConfig(names=("anchor",)), seed=0, length=3, patterns=("presence",))
    with pytest.raises(IndexError):
        PairSource(CONFIG, seed=0, length=3)[3]


def _different_fields(first: object, second: object) -> tuple[str, ...]:
    a, b = dataclasses.asdict(first), dataclasses.asdict(second)
    return tuple(key for key in a if a[key] != b[key])


def _region(pair: PairSpec, drawn: list[Rendered], k: int) -> np.ndarray:
    """Pixels that what changed could have touched, in one of the two renderings."""
    height, width = drawn[k].image.shape[:2]
    spec = pair.specs[k]
    places = [(p.x, p.y, *extent(p), 1) for j, p in enumerate(spec.placements) if j in pair.changed]
    if (text := spec.text) is not None:
        # Letters and their outline are whole pixels wide, so small ones are relatively wider.
        places.append((text.x, text.y, *text_extent(text.text, text.size), 3))
    region = np.zeros((height, width), bool)
    for x, y, wide, tall, margin in places:
        half_x, half_y = (length * min(height, width) / 2 + margin for length in (wide, tall))
        rows = slice(max(0, round(y * height - half_y)), round(y * height + half_y) + 1)
        columns = slice(max(0, round(x * width - half_x)), round(x * width + half_x) + 1)
        region[rows, columns] = True
    return region


def _told_by(statement: str, answer: str) -> bool:
    """The statement says what the answer says."""
    words = {"yes": "with", "no": "without", **dict(zip("12345", oracle.NUMBERS[1:], strict=False))}
    said = words.get(answer, answer)
    return re.search(rf"\b{said}\b", statement) is not None or (
        answer == "1" and re.match("an? ", statement) is not None
    )


def _shown(pair: MinimalPair) -> tuple[object, ...]:
    """All of a pair that can be compared."""
    return (
        pair.id,
        pair.question,
        pair.options,
        *((r.id, r.image.tobytes(), r.captions, r.questions, r.referring) for r in pair.records),
    )
