"""Slices for tests: of CPU devices, and of TPUs that libtpu compiles for."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from perception_jax.shard.slices import Slice

LIBTPU = pathlib.Path(sys.prefix) / "libtpu"
"""Where `make tpu` installs it: beside the packages, so that JAX does not look for a TPU."""


def cpu_slice(chips: int = 8, **changes: float) -> Slice:
    """A slice with round numbers for its chips; `changes` are other fields of `Slice`."""
    numbers = {"hbm": 2**30, "flops": 1e12, "hbm_bandwidth": 1e11, "ici_bandwidth": 1e10}
    return Slice(name="cpus", topology="", chips=chips, **numbers | changes)


def tpu_test(function: Any) -> Any:
    """Marks a test that compiles for TPUs: slow, and skipped where libtpu is not installed."""
    absent = not LIBTPU.is_dir() and importlib.util.find_spec("libtpu") is None
    skipped = pytest.mark.skipif(absent, reason="libtpu is not installed: make tpu")
    return pytest.mark.slow(pytest.mark.tpu_compile(skipped(function)))


def printed_on_tpu(root: pathlib.Path, module: str, *words: str) -> Any:
    """Runs a module that compiles for TPUs in a process of its own; its last line is JSON."""
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{LIBTPU}"}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing runs on a TPU
    environment.pop("XLA_FLAGS", None)  # libtpu does not know those of the test session
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
