"""How the suite runs itself: see tests/session.py."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax._src import compiler

from perception_jax.shard.mesh import batch_sharding, make_mesh
from tests import session


@pytest.mark.parametrize(
    ("cores", "gib", "expected"),
    [(2, 16.0, 2), (2, 7.9, 0), (1, 64.0, 0), (64, 500.0, 4), (8, 13.0, 3), (8, 0.0, 0)],
)
def test_workers_go_by_cores_and_memory(cores, gib, expected):
    assert session.workers(cores, gib) == expected


def test_memory_is_found():
    assert 0.1 < session.available_gib() < 1e5


def test_the_limit_is_on_processor_time_of_unmarked_tests():
    assert "took 61 s" in session.over_limit(90.0, 61.0, slow=False)
    assert "took 62 s" in session.over_limit(62.0, 90.0, slow=False)  # on several cores
    assert session.over_limit(90.0, 59.0, slow=False) == ""  # the machine was busy
    assert session.over_limit(59.0, 90.0, slow=False) == ""
    assert session.over_limit(90.0, 90.0, slow=True) == ""


def test_processor_time_counts_children():
    before = session.processor_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert session.processor_seconds() > before + 0.05


def test_equal_programs_of_several_devices_are_compiled_once(monkeypatch):
    compiled, real = [], compiler.backend_compile_and_load

    def counted(*arguments):
        compiled.append(None)
        return real(*arguments)

    monkeypatch.setattr(compiler, "backend_compile_and_load", counted)
    mesh = make_mesh(devices=jax.devices()[:2])
    rows = jax.device_put(np.arange(6, dtype=np.float32), batch_sharding(mesh))
    for factor in (2.5, 2.5, 3.5):
        found = jax.jit(lambda x, by=factor: (by * x).sum())(rows)
        assert float(found) == 15 * factor
    assert len(compiled) == 2


_OVER = """
import pytest

@pytest.fixture
def long(monkeypatch):
    from tests import session
    monkeypatch.setattr(session, "LIMIT", 0.1)
    sum(range(2 * 10**7))

def test_a(long): pass

@pytest.mark.slow
def test_b(long): pass
"""


def test_a_phase_over_the_limit_fails(root, tmp_path):
    """In a session of its own with this one's settings: the fixtures of two tests are too long."""
    (tmp_path / "test_it.py").write_text(_OVER)
    options = ["-q", "--limit", "-c", root / "pyproject.toml", "--rootdir", root]
    options += ["-p", "no:cacheprovider", "-p", "tests.conftest", tmp_path / "test_it.py"]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=root, capture_output=True, text=True
    )
    assert "1 passed, 1 error" in child.stdout, child.stdout


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
