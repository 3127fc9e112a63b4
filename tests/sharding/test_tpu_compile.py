"""What a TPU slice would hold, compiled for it without one."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from perception_jax.shard import slices

LIBTPU = pathlib.Path(sys.prefix) / "libtpu"
"""Where `make tpu` installs it: beside the packages, so that JAX does not look for a TPU."""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.tpu_compile,
    pytest.mark.skipif(
        not LIBTPU.is_dir() and importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: make tpu",
    ),
]


def compiled(root: pathlib.Path, program: str, *arguments: str) -> Any:
    """What a program of this folder prints about what it compiled."""
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{LIBTPU}"}
    environment.pop("XLA_FLAGS", None)  # libtpu does not know those of the test session
    done = subprocess.run(
        [sys.executable, "-m", f"tests.sharding.{program}", *arguments],
        cwd=root,
        env=environment | slices.ENVIRONMENT | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_vit_l14_336_keeps_its_batch_split_on_v5e(root):
    found = compiled(root, "tpu_gradient")
    assert found["temporary_bytes"] <= 2.0e9
    assert found["collectives"] > 0
    assert found["whole_batch"] == []


def test_block_inputs_of_vit_l14_336_go_to_the_host(root):
    found = compiled(root, "tpu_gradient", "offload")
    # 24 inputs of 16 images, 577 tokens and 1,024 numbers in bfloat16; some are on their way.
    inputs = 24 * 16 * 577 * 1024 * 2
    assert found["host_bytes"] >= inputs
    assert found["temporary_bytes"] <= 1.9e9 - inputs / 2  # with "full" 1.86e9


def test_copies_are_reduced_once_per_update_on_v5e(root):
    found = compiled(root, "tpu_accumulate", "PatchTask")
    assert found["summed_after_the_loop"] >= found["gradient"]
    assert found["summed_in_the_loop"] == 0
    coupled = compiled(root, "tpu_accumulate", "PairTask")
    assert coupled["summed_in_the_loop"] > coupled["gradient"] / 4
