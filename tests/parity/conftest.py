"""`--table=FILE` writes what the parity tests measured."""

from __future__ import annotations

import pathlib

import pytest

from tests.parity import measures


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--table",
        type=pathlib.Path,
        default=None,
        help="Markdown file for what was measured (docs/encoders_parity.md)",
    )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    # Without it where this file was not among the first that pytest read.
    path = session.config.getoption("--table", default=None)
    if path is not None and exitstatus == 0:
        measures.write(path)
