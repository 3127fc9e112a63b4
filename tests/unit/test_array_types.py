"""Annotations are enforced: see tests/array_types.py."""

from __future__ import annotations

import dataclasses

import jaxtyping
import numpy as np
import pytest
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float

from perception_jax.ops import losses
from tests.array_types import checked


@checked
def multiplied(x: Float[np.ndarray, "b d"], y: Float[np.ndarray, " d"]) -> Float[np.ndarray, " b"]:
    return x @ y


@checked
def longer(x: Float[np.ndarray, " n"], by: int) -> Float[np.ndarray, " n+{by}"]:
    return np.zeros(len(x) + max(by, 0), np.float32)


@checked
@dataclasses.dataclass(frozen=True)
class Pair:
    first: Float[np.ndarray, " n"]
    second: Float[np.ndarray, " n"]


@checked
def named(x: int, y: NoSuchType = None) -> str:
    return "x" * x if x else x


def ones(*shape):
    return np.ones(shape, np.float32)


def test_types_and_sizes_that_agree_pass():
    assert multiplied(ones(2, 3), ones(3)).shape == (2,)
    assert multiplied(ones(3, 2), ones(2)).shape == (3,)  # sizes are those of one call
    assert longer(ones(2), by=3).shape == (5,)
    assert Pair(ones(2), ones(2)).first.shape == (2,)
    assert named(2, y=object()) == "xx"


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: multiplied(ones(2, 3), ones(4)),
        lambda: multiplied(ones(2, 3), ones(3, 1)),
        lambda: multiplied(ones(2, 3).astype(np.int32), ones(3)),
        lambda: Pair(ones(2), ones(3)),
        lambda: named("x"),
        lambda: named(0),  # of what it returns
    ],
)
def test_what_does_not_agree_is_an_error(wrong):
    with pytest.raises(BeartypeCallHintViolation):
        wrong()


def test_a_size_may_be_the_value_of_an_argument():
    with pytest.raises(jaxtyping.TypeCheckError):
        longer(ones(2), by=-1)


def test_the_library_is_checked():
    with pytest.raises(BeartypeCallHintViolation):
        losses.unit(ones(2, 3))  # no array of jax


def test_a_test_can_ask_for_no_checks(unchecked):
    assert losses.unit(ones(2, 3)).shape == (2, 3)
    assert multiplied(ones(2, 3).astype(np.int32), ones(3)).shape == (2,)
