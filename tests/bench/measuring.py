"""Measuring in turns, on machines whose speed changes: what benchmarks of models share."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Call = Callable[[], Any]
"""Starts a computation and returns its output, which may not be finished yet."""

SIDE = 2048
"""Rows and columns of the matrices of `products`."""

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "triton")


def wait(output: Any) -> None:
    """Until the output is computed."""
    if isinstance(output, jax.Array):
        output.block_until_ready()
    elif output.is_cuda:
        import torch

        torch.cuda.synchronize()


def seconds_per_call(
    calls: Mapping[str, Call], count: int, queue: int = 1, *, warm_up: int = 3
) -> dict[str, float]:
    """Median seconds of each, taken in turns.

    Args:
      count: timed turns of each.
      queue: calls in a turn; only the last is waited for.
      warm_up: calls of each before.
    """
    for call in (*calls.values(),) * warm_up:
        wait(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(queue):
                output = call()
            wait(output)
            times[name].append((time.perf_counter() - start) / queue)
    return {name: statistics.median(taken) for name, taken in times.items()}


def products(against: bool) -> dict[str, Call]:
    """Square matrix products, which show what the processor can do at the moment."""
    ours = jnp.ones((SIDE, SIDE))
    product = jax.jit(jnp.matmul)
    calls: dict[str, Call] = {"product": lambda: product(ours, ours)}
    if against:
        import torch

        theirs = torch.ones(SIDE, SIDE)
        calls["product, torch"] = lambda: theirs @ theirs
    return calls


def product_rate(taken: Mapping[str, float], names: Iterable[str]) -> float | None:
    """FLOP/s of the fastest of these products; None without any."""
    return max((2 * SIDE**3 / taken[name] for name in names), default=None)


def processor() -> str:
    """Its name, with the instructions for vectors and matrices that matter here."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    known = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    flags = known.get("flags", "").split()
    some = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if name in flags]
    numbers = f"family {known.get('cpu family')} model {known.get('model')}"
    return f"{known.get('model name', platform.machine())}, {numbers}, {' '.join(some)}"


def machine(dtype: Any) -> dict[str, Any]:
    """What the numbers were measured on."""
    versions = {}
    for name in PACKAGES:
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "dtype": jnp.dtype(dtype).name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **versions,
    }
