"""`--table=FILE` writes what the parity tests measured."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import pytest

from tests.parity import measures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--table",
        type=pathlib.Path,
        default=None,
        help="Markdown file for what was measured (docs/encoders_parity.md)",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for row in node.workeroutput.get("measures", ()):
        measures.Row(**row)  # registers itself


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["measures"] = [dataclasses.asdict(row) for row in measures.ROWS]
        return
    # Without it where this file was not among the first that pytest read.
    path = session.config.getoption("--table", default=None)
    if path is not None and exitstatus == 0:
        measures.write(path)
