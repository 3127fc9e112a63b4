"""Every program answers `--help` at once and names the nearest valid word for a wrong one."""

from __future__ import annotations

import ast
import importlib
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import pytest
from absl import flags

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


def flag_names(name: str, command: str | None) -> list[str]:
    """Flags of a program (of one of its commands), besides those that all have."""
    values = flags.FlagValues()
    define = importlib.import_module(f"launch.{name}").PROGRAM.define
    (define if command is None else define[command])(values)
    return sorted(values)


def commands() -> list[tuple[str, str | None]]:
    """Every program, and with commands every one of them."""
    found = []
    for name in programs():
        define = importlib.import_module(f"launch.{name}").PROGRAM.define
        found += [(name, one) for one in define] if isinstance(define, Mapping) else [(name, None)]
    return found


@pytest.mark.parametrize(("name", "command"), commands())
def test_help_is_complete_and_fast(name, command):
    done = run(name, *([] if command is None else [command]), "--help")
    assert done.stdout.startswith(importlib.import_module(f"launch.{name}").__doc__.splitlines()[0])
    for flag in flag_names(name, command):
        assert f"--{flag}" in done.stdout.replace("[no]", "")
    # A second's worth of imports would be one of these; a clock would measure the machine.
    assert "launch" in imported(done)
    assert imported(done) & HEAVY == set()


@pytest.mark.parametrize("name", programs())
def test_a_wrong_flag_names_the_right_one(name):
    command = dict(commands())[name]
    flag = max(flag_names(name, command), key=len)
    program = importlib.import_module(f"launch.{name}").PROGRAM
    words = [*([] if command is None else [command]), f"--{flag[:-1]}=x"]
    with pytest.raises(common.UsageError, match=f"Did you mean --{flag}"):
        common.parse(words, program)


@pytest.mark.parametrize("name", programs())
def test_the_examples_of_the_docstring_are_understood(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(f"launch.{name}")
    lines = module.__doc__.replace("\\\n", "").splitlines()
    examples = [line.split() for line in lines if line.startswith("    python -m")]
    assert examples
    for words in examples:
        assert words[:3] == ["python", "-m", f"launch.{name}"]
        common.parse(words[3:], module.PROGRAM)


@pytest.mark.parametrize(("name", "command"), commands())
def test_the_launch_readme_explains_every_flag(name, command):
    text = (ROOT / "launch" / "README.md").read_text()
    _, found, section = text.partition(f"\n## {name}\n")
    assert found, f"launch/README.md has no section '## {name}'"
    section = section.partition("\n## ")[0]
    assert [flag for flag in flag_names(name, command) if f"--{flag}" not in section] == []


def test_programs_import_nothing_heavy_before_they_run():
    """So `--help` and usage errors stay fast whatever the library grows to."""
    for name in programs():
        tree = ast.parse((ROOT / "launch" / f"{name}.py").read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [alias.name for node in top for alias in node.names if isinstance(node, ast.Import)]
        names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
        assert HEAVY & {module.split(".")[0] for module in names} == set()
