"""Orders of conversations as LLaVA's Trainer draws them, and their division into updates."""

from __future__ import annotations

import itertools
import math
import pickle

import numpy as np
import pytest

from perception_jax.data.grouping import (
    Division,
    GroupedPlanner,
    RowShape,
    length_order,
    modality_order,
)
from perception_jax.errors import ConfigError, DataError


def identity(count: int) -> np.ndarray:
    return np.arange(count)


def test_an_order_by_length_by_hand():
    # Two devices of two rows. First run: 9, 5, 5, 1 → 9 to the first, 5 and 5 to the second (which
    # is then full), 1 to the first. Second run: equal lengths keep their order. The ninth record
    # is a run that two devices do not divide: it is dealt in turn.
    lengths = np.array([5, 1, 9, 5, 3, 3, 3, 4, 2])
    order = length_order(lengths, rows=2, devices=2, permute=identity)
    assert order.tolist() == [2, 1, 0, 3, 7, 6, 4, 5, 8]


def test_an_order_by_modality_by_hand():
    # One device of two rows: images [0 1] [3 4] [6], text [2 5] [7]; the last of both are set
    # aside, the others mixed by the third permutation, and the rest (6, 7) is a whole run: first.
    lengths = np.array([4, 5, -1, 6, 7, -2, 8, -3])
    counts = []

    def reverse_runs(count: int) -> np.ndarray:
        counts.append(count)
        return np.arange(count)[:: 1 if len(counts) < 3 else -1]

    order = modality_order(lengths, rows=2, devices=1, permute=reverse_runs)
    assert counts == [5, 3, 3]
    assert order.tolist() == [6, 7, 5, 2, 4, 3, 1, 0]


def test_one_modality_alone_is_ordered_by_length():
    lengths = np.array([2, 1, 3, 4])
    expected = length_order(lengths, rows=1, devices=2, permute=identity).tolist()
    for signed in (lengths, -lengths):
        assert modality_order(signed, rows=1, devices=2, permute=identity).tolist() == expected


@pytest.mark.parametrize(
    ("records", "division", "epochs", "expected"),
    [
        # LLaVA-1.5: 558,128 / 256 = 2,180.2; 665,298 / 128 = 5,197.6. MoF: two micro-batches of
        # 128 in stage 1, of 88 in stage 2.
        (558_128, Division(rows=32, devices=8), 1, 2181),
        (665_298, Division(rows=16, devices=8), 1, 5198),
        (595_375, Division(rows=16, devices=8, accumulate=2), 1, 2326),
        (665_298, Division(rows=11, devices=8, accumulate=2), 1, 3780),
        (157_712, Division(rows=16, devices=8), 3, 3699),
        (3, Division(rows=2, devices=1, accumulate=8), 2, 2),
    ],
)
def test_updates_of_a_training(records, division, epochs, expected):
    assert division.updates(records, epochs) == expected
    dataloader = math.ceil(records / (division.rows * division.devices))
    assert expected == max(dataloader // division.accumulate, 1) * epochs


def test_a_division_needs_positive_numbers():
    with pytest.raises(ConfigError, match="numbers of at least 1"):
        Division(rows=0)


def planner(order: str = "modality", seed: int = 0, **division: int) -> GroupedPlanner:
    rng = np.random.default_rng(7)
    count = 41
    words = rng.integers(1, 30, count) * np.where(rng.random(count) < 0.4, -1, 1)
    return GroupedPlanner(
        records=np.arange(count) * 2,
        words=words,
        tokens=np.abs(words) + 5 * (words > 0),
        lengths=(8, 16, 40),
        division=Division(**{"rows": 2, "devices": 3, **division}),
        order=order,
        seed=seed,
    )


@pytest.mark.parametrize("order", ["random", "length", "modality"])
def test_an_epoch_has_every_record_and_ends_with_its_first(order):
    plans = planner(order)
    rows = np.concatenate([plans.plan(0, k).record for k in range(plans.batches_per_epoch)])
    assert len(rows) == 42
    assert sorted(rows[:41].tolist()) == list(range(0, 82, 2))
    assert rows[41] == rows[0]
    again = pickle.loads(pickle.dumps(plans))
    assert again.plan(0, 3).record.tolist() == plans.plan(0, 3).record.tolist()
    assert plans.plan(1, 3).record.tolist() != plans.plan(0, 3).record.tolist()
    assert plans.plan(0, 3).record.tolist() != planner(order, seed=1).plan(0, 3).record.tolist()


def test_micro_batches_go_on_from_epoch_to_epoch():
    # 7 micro-batches in an epoch, 3 in an update: two updates, and the seventh begins the third.
    single, double = planner(), planner(accumulate=3)
    assert double.batches_per_epoch == 2
    micro = [single.plan(*divmod(k, 7)).record for k in range(9)]
    updates = [double.plan(*divmod(k, 2)) for k in range(3)]
    for number, update in enumerate(updates):
        expected = np.concatenate(micro[3 * number : 3 * number + 3])
        np.testing.assert_array_equal(update.record, expected)
        np.testing.assert_array_equal(update.group, np.arange(18) // 2)


def test_batches_have_one_modality_and_the_smallest_length_that_fits():
    plans = planner()
    tokens = dict(zip(plans._records.tolist(), plans._tokens.tolist(), strict=True))
    images = dict(zip(plans._records.tolist(), (plans._words > 0).tolist(), strict=True))
    shapes = set()
    for step in range(plans.batches_per_epoch):
        plan = plans.plan(0, step)
        longest = max(tokens[row] for row in plan.record.tolist())
        fitting = next(length for length in (8, 16, 40) if length >= longest)
        kinds = {images[row] for row in plan.record.tolist()}
        assert plan.shape == RowShape(fitting, True in kinds)
        shapes.add(plan.shape)
        mixed = len(kinds) == 2
        assert not mixed or step in (0, plans.batches_per_epoch - 1)
        for row in itertools.islice(plans.redraws(0, step, 4), 20):
            assert tokens[row.record] <= fitting
            assert images[row.record] == images[plan.record[4]]
            assert (row.group, row.shape) == (2, plan.shape)
    assert {shape.images for shape in shapes} == {True, False}


def test_rows_that_fit_nowhere_and_no_rows():
    with pytest.raises(DataError, match=r"at most 4 tokens.*found one of 9 \(record number 1\)"):
        GroupedPlanner(
            records=np.arange(2),
            words=np.ones(2, int),
            tokens=np.array([2, 9]),
            lengths=(4,),
            division=Division(rows=1),
            order="random",
            seed=0,
        )
    nothing = np.zeros(0, int)
    with pytest.raises(DataError, match="expected conversations to train on"):
        GroupedPlanner(
            records=nothing,
            words=nothing,
            tokens=nothing,
            lengths=(4,),
            division=Division(rows=1),
            order="random",
            seed=0,
        )
