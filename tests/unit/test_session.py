"""How the suite runs itself: see tests/session.py."""

from __future__ import annotations

import os
import pathlib

import jax
import pytest

from tests import session


@pytest.mark.parametrize(
    ("cores", "gib", "expected"),
    [(2, 16.0, 2), (2, 7.9, 0), (1, 64.0, 0), (64, 500.0, 4), (8, 13.0, 3), (8, 0.0, 0)],
)
def test_workers_go_by_cores_and_memory(cores, gib, expected):
    assert session.workers(cores, gib) == expected


def test_memory_is_found():
    assert 0.1 < session.available_gib() < 1e5


def test_only_unmarked_tests_on_a_quiet_machine_have_a_limit():
    assert "took 31 s" in session.over_limit(31.0, slow=False, load_per_core=1.5)
    assert session.over_limit(29.0, slow=False, load_per_core=1.5) == ""
    assert session.over_limit(31.0, slow=True, load_per_core=1.5) == ""
    assert session.over_limit(31.0, slow=False, load_per_core=7.0) == ""


def test_long_folders_come_first():
    files = ["tests/unit/test_a.py", "tests/parity/test_b.py", "tests/programs/test_c.py"]
    order = sorted(map(pathlib.Path, files), key=session.place_in_order)
    assert [path.parent.name for path in order] == ["programs", "parity", "unit"]


def test_absent_packages_are_an_error_where_they_should_be(monkeypatch):
    assert session.missing_parity_packages(("jax", "no_such_package")) == ["no_such_package"]
    monkeypatch.setattr(session, "missing_parity_packages", lambda: ["torch"])
    with pytest.raises(pytest.UsageError, match=r"torch cannot be imported.*make parity-packages"):
        session.require_parity_packages()


def test_all_processes_share_what_they_compile():
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
