"""Seconds until the first output in a new process, with an empty and with a filled cache.

Counts the start of Python, the imports and the first call, compilation included; making the
random weights is left out, because a program loads them instead (`loading.py`).
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

CHILD = pathlib.Path(__file__)
OURS, SEPARATE = "ours", "ours, separate"


def measure(names: Sequence[str], batch: int, modes: Sequence[str | None]) -> list[dict[str, Any]]:
    """A row for each tower and side, printed as they come.

    Args:
      names: of the towers.
      batch: images of the first call.
      modes: of torch: None is eager, else a mode of `torch.compile`.
    """
    sides = [OURS, SEPARATE, *("eager" if mode is None else f"compiled:{mode}" for mode in modes)]
    rows = []
    for name in names:
        for side in sides:
            with tempfile.TemporaryDirectory() as cache:
                for start in ("empty cache", "filled cache"):
                    parts = _start(name, side, batch, cache)
                    rows.append({"tower": name, "side": side, "batch": batch, "cache": start})
                    rows[-1] |= parts
                    print(
                        f"{name:13} {side:30} {start:12}  {parts['seconds']:6.2f} s "
                        f"(imports {parts['imports']:.2f}, first call {parts['first_call']:.2f})",
                        flush=True,
                    )
    return rows


def _start(name: str, side: str, batch: int, cache: str) -> dict[str, float]:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(cache) / "xla"),
        "TORCHINDUCTOR_CACHE_DIR": str(pathlib.Path(cache) / "inductor"),
        "TRITON_CACHE_DIR": str(pathlib.Path(cache) / "triton"),
    }
    start = time.time()
    done = subprocess.run(
        [sys.executable, str(CHILD), name, side, str(batch), repr(start)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def _child(name: str, side: str, batch: int, start: float) -> None:
    ours = side in (OURS, SEPARATE)
    imported, weights, first = (_our_start if ours else _their_start)(name, side, batch)
    total = {"imports": imported - start, "first_call": first - weights}
    print(json.dumps(total | {"seconds": sum(total.values())}))


def _our_start(name: str, side: str, batch: int) -> tuple[float, float, float]:
    """When imports, weights and the first call were done."""
    from launch import compile_cache

    compile_cache.enable()
    import jax
    from towers import our_call, our_model, towers

    from perception_jax.nn import stack

    jax.devices()
    imported = time.time()
    tower = towers()[name]
    model = our_model(tower)
    if side == SEPARATE:
        model = stack.separate(model)
    jax.block_until_ready(model)
    weights = time.time()
    our_call(tower, model, batch)().block_until_ready()
    return imported, weights, time.time()


def _their_start(name: str, side: str, batch: int) -> tuple[float, float, float]:
    import torch
    import transformers  # noqa: F401

    imported = time.time()
    # Imports jax, which is no part of their start.
    from towers import their_call, their_model, towers

    tower = towers()[name]
    model = their_model(tower)
    weights = time.time()
    mode = side.partition(":")[2] or None
    output = their_call(tower, model, batch, compiled=mode)()
    if output.is_cuda:
        torch.cuda.synchronize()
    return imported, weights, time.time()


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
