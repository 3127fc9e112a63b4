"""Images per second of image towers, against transformers on torch where both are installed.

python tests/bench/encoders.py [--towers=ViT-B/16,ViT-L/14-336,DINOv2-L] [--batches=1,8]
    [--compile[=MODE,MODE]] [--cold] [--out=FILE.json]

Random weights, float32 on CPU and bfloat16 on a GPU, the same for both sides. The sides take turns
call by call, so that a busy machine slows both; each call is waited for, and the median counts.
"ours, separate" is the model after `nn.stack.separate`. On CPU a plain matrix product of either
library takes its turn too; the share is a tower's FLOP a second against the faster product's.
`--cold` adds the seconds until the first output in a new process, with an empty compilation cache
and with the one that this left behind.
"""

from __future__ import annotations

import os

# Both sides share the GPU's memory. Set before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import argparse
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cold_start
import jax
import numpy as np
import variants
from cold_start import OURS, SEPARATE
from measuring import Call, machine, product_rate, products, seconds_per_call, wait
from towers import (
    Tower,
    forward_flops,
    our_call,
    our_dtype,
    our_model,
    their_call,
    their_model,
    towers,
)

from perception_jax.nn import stack

CALLS = {"cpu": 7, "gpu": 50}
"""Timed calls of each side."""
MODES = "default"


def sides(tower: Tower, models: Mapping[str, Any], batch: int, given: argparse.Namespace):
    """What is measured for one tower and batch, by name, each called once.

    A way that does not run here is named and left out; that ours runs is certain.
    """
    calls: dict[str, Call] = {}
    outputs: dict[str, np.ndarray] = {}
    _first(calls, outputs, OURS, our_call(tower, models[OURS], batch))
    _first(calls, outputs, SEPARATE, our_call(tower, models[SEPARATE], batch))
    for names in given.variants:
        with variants.patched(names):
            _first(calls, outputs, f"ours+{names}", our_call(tower, models[OURS], batch))
    for name, output in outputs.items():
        error = np.linalg.norm(output - outputs[OURS]) / np.linalg.norm(outputs[OURS])
        print(f"# {name} differs from ours by {error:.2g}, relative", flush=True)
    if "theirs" in models:
        import torch

        torch.compiler.reset()
        for mode in (None, *given.compile):
            name = "eager" if mode is None else f"compiled:{mode}"
            _first(calls, outputs, name, their_call(tower, models["theirs"], batch, compiled=mode))
    return calls


def _first(calls: dict[str, Call], outputs: dict[str, Any], name: str, call: Call) -> None:
    """Adds a call that works, and the output of ours."""
    start = time.perf_counter()
    try:
        output = call()
        wait(output)
    except Exception as error:  # whatever a compiler throws
        if name == OURS:
            raise
        print(f"# {name} does not run: {type(error).__name__}: {str(error)[:300]}", flush=True)
        return
    print(f"# {name}: first call {time.perf_counter() - start:.1f} s", flush=True)
    calls[name] = call
    if name.startswith("ours"):
        outputs[name] = np.asarray(output, np.float32)


def throughput(given: argparse.Namespace, against: bool) -> Iterator[dict[str, Any]]:
    """A row for each tower, batch and side, printed as they come."""
    backend = "cpu" if jax.default_backend() == "cpu" else "gpu"
    for name in given.towers:
        tower = towers()[name]
        models = {OURS: our_model(tower)}
        models[SEPARATE] = stack.separate(models[OURS], keep=True)
        if against:
            models["theirs"] = their_model(tower)
        for batch in given.batches:
            calls = sides(tower, models, batch, given)
            extra = products(against) if backend == "cpu" else {}
            flops = forward_flops(tower, models[OURS], batch)
            for queue in given.queue:
                taken = seconds_per_call(calls | extra, given.calls or CALLS[backend], queue)
                best = product_rate(taken, extra)
                for side in calls:
                    seconds = taken[side]
                    row = {"tower": name, "batch": batch, "queue": queue, "side": side}
                    row |= {"images_per_s": batch / seconds, "ours_over_it": seconds / taken[OURS]}
                    line = (
                        f"{name:13} batch {batch:3} queue {queue:3}  {side:38} "
                        f"{batch / seconds:9.2f} images/s  ours is {row['ours_over_it']:.2f}x"
                    )
                    if best:
                        rate = flops / seconds
                        row |= {"flops_per_s": rate, "share_of_product": rate / best}
                        line += f"  {rate / best:.0%} of {best / 1e9:.0f} GFLOP/s"
                    print(line, flush=True)
                    yield row


def parse(argv: Sequence[str]) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    def numbers(text: str) -> list[int]:
        return [int(word) for word in words(text)]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--towers", type=words, default=list(towers()))
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument(
        "--compile", type=words, nargs="?", const=[MODES], default=[], help="torch.compile's modes"
    )
    parser.add_argument("--variants", type=words, default=[], help="see variants.py")
    parser.add_argument("--queue", type=numbers, default=[1], help="calls for one wait")
    parser.add_argument("--calls", type=int, default=0, help="timed calls of each side")
    parser.add_argument("--cold", action="store_true", help="measures the start of a process")
    parser.add_argument("--no-throughput", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, help="JSON with the numbers")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    given = parse(argv)
    against = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    found: dict[str, Any] = {"machine": machine(our_dtype())}
    print(json.dumps(found["machine"]), flush=True)

    def save() -> None:
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")

    if given.cold:
        modes = [None, *given.compile] if against else []
        found["cold"] = cold_start.measure(given.towers, given.batches[0], modes)
        save()
    if not given.no_throughput:
        found["throughput"] = []
        for row in throughput(given, against):
            found["throughput"].append(row)
            save()


if __name__ == "__main__":
    main(sys.argv[1:])
