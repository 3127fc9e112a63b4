"""Golden cases: `<root>/<system>/<case>/`, made by the authors' own code.

Every size and setting is read from the case's own files, so the checks run on any folder of cases:
`pytest tests/parity --goldens=DIR`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder of tensors and the settings that produced them."""

    directory: pathlib.Path

    @property
    def system(self) -> str:
        return self.directory.parent.name

    @property
    def name(self) -> str:
        return self.directory.name

    @functools.cached_property
    def settings(self) -> Mapping[str, Any]:
        """`case.json`, with `config.json` and `meta.json` merged in where a case has them."""
        merged: dict[str, Any] = {}
        for file in ("meta.json", "config.json", "case.json"):
            path = self.directory / file
            if path.is_file():
                merged |= json.loads(path.read_text())
        return merged

    @functools.cached_property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """`io.npz`, read whole."""
        with np.load(self.directory / "io.npz", allow_pickle=False) as file:
            return dict(file)

    @property
    def weights(self) -> pathlib.Path:
        return self.directory / "weights.safetensors"


Check = Callable[[Case], None]
_CHECKS: list[tuple[str, Callable[[Case], bool], Check]] = []


def check(system: str, when: Callable[[Case], bool]) -> Callable[[Check], Check]:
    """Registers a check for the cases of `system` for which `when` holds."""

    def register(function: Check) -> Check:
        _CHECKS.append((system, when, function))
        return function

    return register


def find_check(case: Case) -> Check | None:
    """The check of a case; None if its system or model is not built yet."""
    for system, when, function in _CHECKS:
        if system == case.system and when(case):
            return function
    return None


def find_cases(root: pathlib.Path) -> list[Case]:
    """All case folders below `root`, by name."""
    return [Case(path.parent) for path in sorted(root.glob("*/*/case.json"))]


def assert_close(actual: Any, expected: np.ndarray, *, what: str, tolerance: float = 2e-5) -> None:
    """Largest deviation at most `tolerance`, relative to the array's maximum where that exceeds 1
    (`specs`: test assets)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    allowed = tolerance * max(1.0, float(np.abs(expected).max(initial=0.0)))
    worst = float(np.abs(actual - expected).max(initial=0.0))
    assert worst <= allowed, f"{what}: deviates by {worst:.3g}, allowed {allowed:.3g}"
