"""Shared by all tests: eight virtual CPU devices, exact matrix products, enforced array types."""

from __future__ import annotations

import pathlib

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
# Every annotation of the library is checked at each call.
install_import_hook("perception_jax", "beartype.beartype")

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=pathlib.Path,
        default=ROOT / "tests" / "goldens",
        help="folder of golden cases, <system>/<case>/ (default: tests/goldens)",
    )
    parser.addoption(
        "--report",
        type=pathlib.Path,
        default=None,
        help="a report.html for the browser test (default: a demo report)",
    )


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The repository's root."""
    return ROOT
