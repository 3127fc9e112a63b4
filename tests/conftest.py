"""Shared by all tests: eight virtual CPU devices, exact matrix products, enforced array types."""

from __future__ import annotations

import gc
import logging
import os
import pathlib
from collections.abc import Iterator

import pytest

from launch import compile_cache
from tests import session

ROOT = pathlib.Path(__file__).resolve().parent.parent
session.share_compiled_programs(ROOT)
session.compile_quickly()
if "PYTEST_XDIST_WORKER" in os.environ:  # torch's threads would wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax  # noqa: E402
import jaxtyping  # noqa: E402

from tests import array_types  # noqa: E402

compile_cache.skip_several_cpu_devices()
session.keep_programs_of_several_devices()
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
# Every annotation of the library is checked at each call.
array_types.enforce("perception_jax")
# Tracing makes many short-lived objects; collecting at the default rate costs 7 % of the time.
gc.set_threshold(50_000, 20, 20)
# No test cuts the power; waiting for the disk was a tenth of the suite's time.
os.fsync = lambda descriptor: None


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
    parser.addoption(
        "--parity",
        action="store_true",
        help="a package that tests/parity needs and that is absent is an error, not a skip",
    )
    parser.addoption(
        "--limit",
        action="store_true",
        help=f"fail tests that are not marked slow and take more than {session.LIMIT:.0f} s",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--parity"):
        session.require_parity_packages()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return session.workers(os.cpu_count() or 1, session.available_gib())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: session.place_in_order(item.path))


_PHASE_START = pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    item.stash[_PHASE_START] = session.processor_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Called behind each of setup, call and teardown."""
    report = yield
    start, now = item.stash[_PHASE_START], session.processor_seconds()
    item.stash[_PHASE_START] = now
    if report.passed and item.config.getoption("--limit"):
        slow = item.get_closest_marker("slow") is not None
        why = session.over_limit(report.duration, now - start, slow=slow)
        if why:
            report.outcome, report.longrepr = "failed", f"{item.nodeid} {why}"
    return report


@pytest.fixture(autouse=True)
def _without_the_log_of_programs() -> None:
    """`launch.train` logs to the stderr of its process; that of a test before is closed by now."""
    log = logging.getLogger()
    for handler in [each for each in log.handlers if type(each) is logging.StreamHandler]:
        log.removeHandler(handler)
        log.setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    """The repository's root."""
    return ROOT


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No checks of annotations, as in a user's program: wrong types reach the library's own checks.

    Small calls are several times as fast without them.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
