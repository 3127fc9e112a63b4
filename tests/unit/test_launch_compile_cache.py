"""Programs keep what they compile, and a cache that fails them costs time alone."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from launch import common, compile_cache

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAM = common.Program(name="x", define=lambda values: None)
SCRIPT = """
import sys
from launch import common

def run(parsed):
    import jax
    import jax.monitoring
    from launch import compile_cache
    compile_cache.skip_several_cpu_devices()
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    with jax.set_mesh(mesh):
        print(jax.jit(lambda x: x * 3)(14.0))
    print(any(event.endswith("/cache_hits") for event in events))

common.start(common.Program(name="x", define=lambda values: None), run)
"""


def start(cache: pathlib.Path, **environment: str) -> str:
    """Runs the program in a new process; what it says about its cache."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=kept | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(cache)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    answer, hit = done.stdout.split()
    assert answer == "42.0"
    return hit


def test_the_second_start_compiles_nothing_and_damage_costs_time_alone(tmp_path):
    assert [start(tmp_path), start(tmp_path)] == ["False", "True"]
    files = list(tmp_path.rglob("*-cache"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    assert start(tmp_path) == "False"


def test_a_program_of_several_cpu_devices_is_compiled_anew(tmp_path):
    """jaxlib reads it back without the order of its collectives, and it hangs."""
    two = {"JAX_NUM_CPU_DEVICES": "2"}
    assert [start(tmp_path, **two), start(tmp_path, **two)] == ["False", "False"]


@pytest.mark.parametrize("named", [True, False], ids=["named by the user", "our own"])
def test_a_folder_that_cannot_be_made_costs_time_alone(tmp_path, named):
    (tmp_path / "file").touch()
    place = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "file" / "xla")} if named else {}
    assert start(tmp_path / "file", **place) == "False"


def test_the_user_names_the_folder_or_switches_it_off(tmp_path):
    start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert {file.parent.name for file in tmp_path.rglob("*-cache")} == {"mine"}
    start(tmp_path / "off", JAX_ENABLE_COMPILATION_CACHE="0")
    assert not list((tmp_path / "off").rglob("*-cache"))


def test_only_a_process_of_its_own_switches_it_on(monkeypatch):
    started = []
    monkeypatch.setattr(compile_cache, "enable", lambda: started.append(True))
    assert common.main(PROGRAM, lambda parsed: 0, []) == 0
    assert not started


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    for age in range(4):
        file = tmp_path / f"{age}-cache"
        file.write_bytes(b"x" * 100)
        os.utime(file, (1000 - age, 2000 + age))
    compile_cache._shrink(tmp_path, 400)
    assert len(list(tmp_path.iterdir())) == 4
    compile_cache._shrink(tmp_path, 399)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0-cache"]
