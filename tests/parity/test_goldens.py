"""Runs every golden case found under `--goldens` through the check of its system."""

from __future__ import annotations

import importlib
import pathlib
import pkgutil

import pytest

from tests.parity import checks
from tests.parity.cases import Case, find_cases, find_check

for module in pkgutil.iter_modules(checks.__path__):
    importlib.import_module(f"{checks.__name__}.{module.name}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    root = pathlib.Path(metafunc.config.getoption("--goldens"))
    cases = find_cases(root)
    if not cases:
        raise pytest.UsageError(f"--goldens={root}: no <system>/<case>/case.json below it")
    ids = [f"{case.system}/{case.name}" for case in cases]
    metafunc.parametrize("case", cases, ids=ids)


def test_golden(case: Case) -> None:
    check = find_check(case)
    if check is None:
        pytest.skip(f"{case.system}/{case.name}: not built yet")
    check(case)
