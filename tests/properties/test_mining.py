"""Mining of blind pairs equals its definition, whatever the blocks and devices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perception_jax.errors import ConfigError, DataError
from perception_jax.evals.ranking import unit_rows
from perception_jax.shard import mesh as mesh_lib
from perception_jax.systems.mmvp.mining import BlindPairs, Miner, Thresholds


def brute_force(first: np.ndarray, second: np.ndarray, limits: Thresholds) -> list[tuple]:
    """The definition, in order."""
    cosines = [
        (unit.astype(np.float64) @ unit.astype(np.float64).T).astype(np.float32)
        for unit in (unit_rows(first, "first"), unit_rows(second, "second"))
    ]
    wanted = (cosines[0] > limits.above) & (cosines[1] < limits.below)
    found = [
        (-cosines[0][i, j], cosines[1][i, j], int(i), int(j))
        for i, j in np.argwhere(np.triu(wanted, 1))
    ]
    return [(i, j, -near, far) for near, far, i, j in sorted(found)]


def listed(pairs: BlindPairs) -> list[tuple]:
    columns = (pairs.i, pairs.j, pairs.first, pairs.second)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, Thresholds]:
    """Embeddings of few directions, so that duplicates, ties and exact thresholds come up."""
    count = draw(st.integers(2, 24))
    directions = [(1, 0, 0), (3, 4, 0), (4, 3, 0), (0, 1, 0), (24, 7, 0), (0, 0, 2), (-1, 0, 0)]
    numbers = st.lists(st.integers(0, len(directions) - 1), min_size=count, max_size=count)
    first, second = (np.array([directions[k] for k in draw(numbers)], np.float32) for _ in "ab")
    above = draw(st.sampled_from([-1.0, 0.0, 0.6, 0.8, 0.95, 0.96, 1.0]))
    below = draw(st.sampled_from([1.0, 0.96, 0.6, 0.0, -1.0]))
    return first, second, Thresholds(above=above, below=below)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(1, 30))
def test_every_pair_of_the_definition_is_found_and_no_other(case, columns):
    first, second, limits = case
    # 24 columns at most keep the compiled shapes few.
    found = Miner(first, second, limits, columns=min(columns, 24))()
    assert listed(found) == brute_force(first, second, limits)


def clustered(count: int, width: int, seed: int) -> np.ndarray:
    """Rows around a few centres, many of them similar."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count // 10 + 1, width))
    rows = centres[rng.integers(0, len(centres), count)] + 0.25 * rng.normal(size=(count, width))
    return rows.astype(np.float32)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_blocks_and_devices_change_nothing(devices):
    first, second = clustered(2900, 24, 0), clustered(2900, 12, 1)
    limits = Thresholds(above=0.93, below=0.2)
    sizes = {2: (1, 2, 1), 8: (2, 2, 2)}
    some = jax.devices()[:devices]
    mesh = mesh_lib.make_mesh(*sizes[devices], devices=some) if devices > 1 else None
    found = [Miner(first, second, limits, columns=c, mesh=mesh)() for c in (997, 4000)]
    expected = brute_force(first, second, limits)
    assert len(expected) > 100
    for one in found:
        assert [row[:2] for row in listed(one)] == [row[:2] for row in expected]
        np.testing.assert_array_equal(
            np.array(listed(one), np.float32), np.array(expected, np.float32)
        )
    assert found[0].similar == found[1].similar > len(expected)
    assert found[0].lowest == found[1].lowest == min(row[3] for row in expected)


def test_embeddings_that_cannot_be_compared_are_refused():
    good = np.eye(4, dtype=np.float32)
    for bad, words in (
        (good[:3], r"shapes \(4, 4\) and \(3, 4\)"),
        (good[0], "one row for each image"),
        (np.where(good > 0, np.nan, good), "second embeddings from row 0 on"),
        (np.where(good > 0, np.inf, good), "finite non-zero"),
        (np.zeros_like(good), "finite non-zero"),
    ):
        with pytest.raises(DataError, match=words):
            Miner(good, bad)
    with pytest.raises(DataError, match="at least two images"):
        Miner(good[:1], good[:1])
    with pytest.raises(ConfigError, match="above: expected a cosine"):
        Thresholds(above=95.0)
    with pytest.raises(ConfigError, match="columns: expected at least 1"):
        Miner(good, good, columns=0)


def test_a_search_that_keeps_everything_is_given_up(monkeypatch):
    monkeypatch.setattr("perception_jax.systems.mmvp.mining.MOST_PAIRS", 5)
    with pytest.raises(DataError, match="more than 5 similar pairs"):
        Miner(np.ones((9, 3), np.float32), np.eye(9, dtype=np.float32))()
    # Block by block: none has more than 5 similar pairs, together they have 6 blind ones.
    with pytest.raises(DataError, match="more than 5 blind pairs"):
        Miner(np.ones((4, 3), np.float32), np.eye(4, dtype=np.float32), columns=1)()
