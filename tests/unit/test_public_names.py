"""Packages export public names that are imported when they are first used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

SYSTEMS = [
    f"perception_jax.systems.{name}"
    for name in ("contrastive", "encoder", "give", "mmvp", "selfsup")
]
PACKAGES = ["perception_jax.interop", *SYSTEMS]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_exists_under_its_own_name(package):
    module = importlib.import_module(package)
    assert dir(module) == sorted(module.__all__)
    for name in module.__all__:
        found = getattr(module, name)
        assert getattr(found, "__name__", name) == name
    with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_importing_a_system_or_its_program_imports_no_jax():
    code = "; ".join(
        [f"import {package}" for package in PACKAGES]
        + [f"import {package}.program" for package in SYSTEMS]
        + ["import sys", "print(*sys.modules)"]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"jax", "numpy", "flax", "PIL"} & set(done.stdout.split()) == set()
