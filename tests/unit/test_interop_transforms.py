"""Every transform against arrays written down by hand, and its inverse."""

from __future__ import annotations

import numpy as np
import pytest

from perception_jax.errors import CheckpointError
from perception_jax.interop.transforms import (
    CONV,
    IDENTITY,
    LINEAR,
    SPLIT_LINEAR,
    Concat,
    Constant,
    Dropped,
    ExtraAxes,
    FoldedPosition,
    Reshape,
    RopePermute,
    Split,
    chain,
)

A23 = np.arange(6).reshape(2, 3)

CASES = {
    "identity": (IDENTITY, [A23], [A23]),
    "linear": (LINEAR, [A23], [[[0, 3], [1, 4], [2, 5]]]),
    "conv": (CONV, [np.arange(4).reshape(2, 1, 1, 2)], [[[[[0, 2]], [[1, 3]]]]]),
    "extra axes": (ExtraAxes((0, 2)), [A23.reshape(1, 2, 1, 3)], [A23]),
    "scalar": (ExtraAxes((0,)), [np.array([7])], [7]),
    "reshape": (Reshape((-1, 2)), [np.arange(6).reshape(3, 2)], [A23]),
    # One head of width 4: the pairs (0, 1), (2, 3) become (0, 2), (1, 3).
    "rope": (RopePermute(1), [np.array([0, 1, 2, 3])], [[0, 2, 1, 3]]),
    "rope, two heads": (
        RopePermute(2),
        [np.array([[0, 1, 2, 3, 10, 11, 12, 13]]).T],
        [np.array([[0, 2, 1, 3, 10, 12, 11, 13]]).T],
    ),
    "rope, theirs half": (RopePermute(1, "half"), [np.array([0, 2, 1, 3])], [[0, 1, 2, 3]]),
    "split": (Split(0), [np.arange(3)], [[0], [1, 2]]),
    "split, axis 1": (Split(1), [A23], [[[0, 1], [3, 4]], [[2], [5]]]),
    "split linear": (SPLIT_LINEAR, [A23], [[[0], [1], [2]], [[3], [4], [5]]]),
    "concat": (Concat(2), [np.array([0, 1]), np.array([2, 3])], [[0, 1, 2, 3]]),
    "concat, sizes": (Concat((1, 2)), [np.array([0]), np.array([1, 2])], [[0, 1, 2]]),
    "concat of linears": (
        chain(LINEAR, Concat(2, axis=1)),
        [np.array([[0, 1]]), np.array([[2, 3]])],
        [[[0, 2], [1, 3]]],
    ),
    "1 × 1 conv as linear": (
        chain(ExtraAxes((2, 3)), LINEAR),
        [np.arange(6).reshape(3, 2, 1, 1)],
        [[[0, 2, 4], [1, 3, 5]]],
    ),
    "patch conv as linear": (
        chain(Reshape((-1, 1, 1, 2)), LINEAR),
        [np.arange(6).reshape(3, 1, 1, 2)],
        [[[0, 2, 4], [1, 3, 5]]],
    ),
    "constant": (Constant(0.5), [], [[0.5, 0.5]]),
    "folded position": (
        FoldedPosition(),
        [np.array([[[7, 8, 9]]]), A23[None]],
        [[7, 8, 9], [[0, 0, 0], [0, 1, 2], [3, 4, 5]]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name):
    transform, theirs, ours = CASES[name]
    ours = [np.asarray(array) for array in ours]
    shapes = [array.shape for array in ours]
    made = transform.to_targets(theirs, shapes)
    assert [array.tolist() for array in made] == [array.tolist() for array in ours]
    assert transform.source_shapes(shapes) == [array.shape for array in theirs]
    back = transform.to_sources(ours)
    assert [array.tolist() for array in back] == [array.tolist() for array in theirs]


@pytest.mark.parametrize(
    ("transform", "shapes"),
    [
        (LINEAR, [(3,)]),
        (ExtraAxes((3,)), [(2,)]),
        (Reshape((-1, 4)), [(2, 3)]),
        (RopePermute(2), [(6,)]),
        (Split(0), [(2, 3), (2, 4)]),
        (Split(1), [(2,), (2,)]),
        (Concat(2), [(3,)]),
        (Concat((1, 1)), [(3,)]),
        (FoldedPosition(), [(3,), (5, 4)]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(transform, shapes):
    with pytest.raises(ValueError, match=r"\d"):
        transform.source_shapes(shapes)


def test_a_constant_that_changed_cannot_be_exported():
    with pytest.raises(CheckpointError, match="always 0"):
        Constant(0.0).to_sources([np.array([0.0, 1e-8])])


def test_a_position_is_folded_into_its_token_and_signs_of_zero_stay():
    token = np.array([-0.0, 1.0], np.float32)
    table = np.array([[0.0, 0.5], [3.0, 4.0]], np.float32)
    theirs, rest = FoldedPosition().to_sources([token, table])
    assert theirs.tolist() == [[[0.0, 1.5]]]
    assert np.signbit(theirs[0, 0, 0])
    assert rest.tolist() == [[[3.0, 4.0]]]


def test_what_only_training_needs_is_left_out():
    assert Dropped(0.0).to_sources([np.array([1.0])]) == []
    assert Dropped(0.0).to_targets([], [(2,)])[0].tolist() == [0.0, 0.0]


def test_views_stay_views():
    """A shard reads only its slice because nothing is copied on the way to it."""
    big = np.arange(24).reshape(6, 4)
    made = SPLIT_LINEAR.to_targets([big], [(4, 2)] * 3)
    assert all(np.shares_memory(part, big) for part in made)
    conv = CONV.to_targets([big.reshape(3, 2, 2, 2)], [(2, 2, 2, 3)])[0]
    assert np.shares_memory(conv, big)
