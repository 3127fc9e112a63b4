"""What a TPU slice would hold, compiled for it without one."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

LIBTPU = pathlib.Path(sys.prefix) / "libtpu"
"""Where `make tpu` installs it: beside the packages, so that JAX does not look for a TPU."""


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.skipif(
    not LIBTPU.is_dir() and importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: make tpu",
)
@pytest.mark.parametrize(("model", "temporary"), [("vit", 1.2e9), ("decoder", 2.3e9)])
def test_gradients_keep_their_batch_split_and_no_scores_on_v5e(model, temporary, root):
    """The forward pass's kernel, that of the recomputed one, and the backward pass's."""
    environment = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{LIBTPU}",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    environment.pop("XLA_FLAGS", None)  # libtpu does not know those of the test session
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharding.tpu_gradient", model],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["temporary_bytes"] <= temporary
    assert found["collectives"] > 0
    assert found["kernels"] == 3
    assert found["whole_batch"] == []
