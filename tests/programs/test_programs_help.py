"""Every program answers `--help` at once and names the nearest valid word for a wrong one."""

from __future__ import annotations

import ast
import importlib
import pathlib
import subprocess
import sys

import pytest

from launch import common

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEAVY = {"jax", "flax", "numpy", "optax", "orbax", "grain", "PIL", "tokenizers", "safetensors"}


def programs() -> list[str]:
    """Modules of `launch` that are run with `python -m`."""
    files = sorted((ROOT / "launch").glob("*.py"))
    return [f.stem for f in files if '\nif __name__ == "__main__":' in f.read_text()]


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"launch.{name}", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """Top-level packages, from what `-X importtime` writes."""
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


def test_the_promised_programs_are_there():
    assert {"train", "evaluate", "convert", "check_data"} <= set(programs())


@pytest.mark.parametrize("name", programs())
def test_help_is_complete_and_fast(name):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    program = importlib.import_module(f"launch.{name}").PROGRAM
    assert done.stdout.startswith(f"usage: python -m launch.{name} ")
    assert program.name == name
    assert program.examples
    for flag in program.flags:
        assert f"--{flag.name}" in done.stdout
        assert flag.help
    # A second's worth of imports would be one of these; a clock would measure the machine.
    assert "launch" in imported(done)
    assert imported(done) & HEAVY == set()


@pytest.mark.parametrize("name", programs())
def test_a_wrong_flag_names_the_right_one(name):
    program = importlib.import_module(f"launch.{name}").PROGRAM
    flag = program.flags[0].name
    done = run(name, f"--{flag[:-1]}=x")
    assert done.returncode == 2
    assert f"Did you mean --{flag}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", programs())
def test_examples_are_understood(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    program = importlib.import_module(f"launch.{name}").PROGRAM
    for example in program.examples:
        words = example.split()
        assert words[:3] == ["python", "-m", f"launch.{name}"]
        common.parse(words[3:], program)


@pytest.mark.parametrize("name", programs())
def test_the_launch_readme_explains_every_flag(name):
    text = (ROOT / "launch" / "README.md").read_text()
    _, found, section = text.partition(f"\n## {name}\n")
    assert found, f"launch/README.md has no section '## {name}'"
    section = section.partition("\n## ")[0]
    program = importlib.import_module(f"launch.{name}").PROGRAM
    missing = [flag.name for flag in program.flags if f"--{flag.name}" not in section]
    assert missing == []


def test_programs_import_nothing_heavy_before_they_run():
    """So `--help` and usage errors stay fast whatever the library grows to."""
    for name in programs():
        tree = ast.parse((ROOT / "launch" / f"{name}.py").read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [alias.name for node in top for alias in node.names if isinstance(node, ast.Import)]
        names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
        assert HEAVY & {module.split(".")[0] for module in names} == set()
