"""Runs that are killed, at random moments and at chosen points, and resumed: bit-equal."""

from __future__ import annotations

import pathlib

import pytest

from tests.killing import Server, series


@pytest.mark.parametrize("kills", [6, pytest.param(300, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_equal(root: pathlib.Path, tmp_path: pathlib.Path, kills: int):
    with Server(root) as server:
        done = series(server, tmp_path, kills, seed=kills)
    print(dict(done))
    assert done.total() == kills
