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


def compiled(root: pathlib.Path, module: str, *arguments: str) -> dict[str, Any]:
    """What a program of this folder prints."""
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{LIBTPU}"}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nothing runs on a TPU
    environment.pop("XLA_FLAGS", None)  # libtpu does not know those of the test session
    done = subprocess.run(
        [sys.executable, "-m", f"tests.sharding.{module}", *arguments],
        cwd=root,
        env=environment,
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


@pytest.mark.parametrize("kind", ["all", "lora"])
def test_a_7b_decoder_keeps_its_batch_and_its_vocabulary_split_on_v5e(root, kind):
    """Two of its 32 blocks: the others are the same in the scan."""
    found = compiled(root, "tpu_text", kind)
    assert found["collectives"] > 0
    assert found["whole_batch"] == []
    assert found["whole_vocabulary"] == []
    assert found["split_vocabulary"] > 0
    # Of the logits, 256 tokens of each of a chip's rows at a time; or the table, if it is larger.
    chunk = found["rows"] * 256 * found["vocabulary"]
    assert found["logits"] <= max(chunk, 4096 * found["vocabulary"])
    assert found["temporary_bytes"] <= 8.0e9
