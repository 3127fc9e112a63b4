"""Time to find blind pairs among the embeddings of many images, against blocked numpy.

python tests/bench/mining.py [--images=50000] [--widths=768,1024] [--columns=2048] [--out=FILE.json]

Both sides take turns block of columns by block, so that a busy machine slows both; the pairs must
be equal. Numpy multiplies blocks of rows above the diagonal with the columns (float32), compares
with the first threshold, and computes the second encoder's cosines for the pairs that pass. Seconds
by the clock and of the processor are both given: on a machine that other programs use, the second
say more.

A million images take (1,000,000 / images)² times as long: the printed extrapolation.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import numpy as np
from measuring import machine

from perception_jax.systems.mmvp.mining import BlindPairs, Miner, Thresholds

ROWS = 4096
"""Rows of a block of numpy."""
MILLION = 1_000_000


def embeddings(count: int, width: int, seed: int, *, every: int) -> np.ndarray:
    """Random unit vectors; one in `every` is close to its neighbour, by various distances."""
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((count, width), np.float32)
    near = np.arange(1, count, every)
    noise = rng.uniform(0, 0.6, (len(near), 1)).astype(np.float32)
    found[near] = found[near - 1] + noise * rng.standard_normal((len(near), width), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def by_numpy(first: np.ndarray, second: np.ndarray, limits: Thresholds, block: slice) -> np.ndarray:
    """Pairs (i, j) with j in the block."""
    found = []
    for start in range(0, block.stop, ROWS):
        rows = slice(start, min(start + ROWS, block.stop))
        i, j = np.nonzero(first[rows] @ first[block].T > limits.above)
        i, j = i + rows.start, j + block.start
        i, j = i[i < j], j[i < j]
        far = np.einsum("nd,nd->n", second[i], second[j]) < limits.below
        found.append(np.stack([i[far], j[far]], axis=1))
    return np.concatenate(found)


class Clock:
    """Seconds by the clock and of the processor, summed over calls."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0

    def __call__(self, call: Callable[[], object]) -> object:
        wall, processor = time.perf_counter(), time.process_time()
        result = call()
        self.wall += time.perf_counter() - wall
        self.processor += time.process_time() - processor
        return result


def measured(first: np.ndarray, second: np.ndarray, columns: int) -> Iterator[str]:
    """Lines about the search, the last of them JSON."""
    limits, ours, theirs, placing = Thresholds(), Clock(), Clock(), Clock()
    miner = placing(lambda: Miner(first, second, limits, columns=columns))
    list(miner.search(miner.blocks[:1]))  # compiles
    parts, pairs = [], []
    for block in miner.blocks:
        parts += ours(lambda block=block: list(miner.search([block])))
        pairs.append(theirs(lambda block=block: by_numpy(first, second, limits, block)))
    found, expected = BlindPairs.joined(parts), np.concatenate(pairs)
    same = sorted(zip(found.i.tolist(), found.j.tolist(), strict=True)) == sorted(
        map(tuple, expected.tolist())
    )
    count = len(first)
    flops = float(count) ** 2 * first.shape[1]  # half of the matrix, two each
    yield f"{count:,} images, {len(miner.blocks)} blocks"
    yield f"{found.similar} similar pairs, {len(found)} of them blind"
    yield f"pairs equal numpy's: {same}"
    for name, clock in (("ours", ours), ("numpy", theirs)):
        yield (
            f"{name:6} {clock.wall:7.1f} s by the clock, {clock.processor:7.1f} of the processor, "
            f"{flops / clock.wall / 1e9:6.1f} GFLOP/s, "
            f"{flops / clock.processor / 1e9:6.1f} a processor second"
        )
    ratios = theirs.wall / ours.wall, theirs.processor / ours.processor
    yield f"ratio  {ratios[0]:.2f} by the clock, {ratios[1]:.2f} of the processor"
    yield f"before: unit lengths and placing {placing.wall:.1f} s"
    scale = (MILLION / count) ** 2
    hours = scale * ours.wall / 3600
    yield (
        f"a million images: {scale:.0f} times the search, {hours:.1f} hours on this machine; "
        f"{scale * flops / 1e12:.0f} TFLOP in float32"
    )
    yield json.dumps(
        {
            "images": count,
            "widths": [first.shape[1], second.shape[1]],
            "similar": found.similar,
            "blind": len(found),
            "equal": same,
            "seconds": {"ours": ours.wall, "numpy": theirs.wall, "placing": placing.wall},
            "processor_seconds": {"ours": ours.processor, "numpy": theirs.processor},
            "load": os.getloadavg(),
            "machine": machine(np.float32),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--widths", default="768,1024")
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    widths = map(int, options.widths.split(","))
    # Half of the pairs that are close for the first are not for the second.
    first, second = (
        embeddings(options.images, width, k, every=50 * (k + 1)) for k, width in enumerate(widths)
    )
    print(f"load before: {os.getloadavg()}")
    for line in measured(first, second, options.columns):
        print(line, flush=True)
    if options.out is not None:
        options.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
