"""Images per second and core that the loader decodes, resizes and batches, against torch's.

python tests/bench/data.py [--workers=2] [--rounds=5] [--images=1024] [--out=FILE.json]

Both sides do the same work with Pillow: decode a JPEG of COCO's size (640 × 480, quality 90),
resize its shortest side to 336 (bicubic, antialiased), cut out the centre, and batch 64 of them as
uint8. Each turn is a process of its own, and the sides take turns: our loader with threads and with
worker processes, `torch.utils.data.DataLoader` without and with workers; the fastest one of torch
counts. Rates are per second of processor time, workers included: other processes on the machine
do not count, nor do the first batches, during which workers start.

What an accelerator needs follows from the FLOPs of a training step of CLIP ViT-L/14-336, counted on
shapes: examples/s of a TPU v5e chip at 50 % MFU, and the cores that provide them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

SIDE, BATCH, FILES = 336, 64, 256
WARM_UP = 4
"""Batches before the clock starts."""
SIDES = ("ours, threads", "torch, alone", "ours, workers", "torch, workers")
MFU = 0.5


def write_images(folder: pathlib.Path) -> None:
    """JPEGs whose detail falls with its frequency, as that of photographs does."""
    rng = np.random.default_rng(0)
    for number in range(FILES):
        image = np.zeros((480, 640, 3), np.float32)
        for octave in range(7):
            small = rng.normal(size=(max(2, 480 >> octave), max(2, 640 >> octave), 3))
            part = PIL.Image.fromarray(np.uint8(np.clip(127 + 40 * small, 0, 255)))
            grown = part.resize((640, 480), PIL.Image.Resampling.BICUBIC)
            image += (np.asarray(grown, np.float32) - 127) * 2.0**octave / 40
        image = np.uint8(np.clip(127 + 60 * image / image.std(), 0, 255))
        data = io.BytesIO()
        PIL.Image.fromarray(image).save(data, "JPEG", quality=90)
        (folder / f"{number:03}.jpg").write_bytes(data.getvalue())


class OurSource:
    """The files as records."""

    def __init__(self, folder: pathlib.Path):
        self.files = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from perception_jax.data.records import Record

        file = self.files[index]
        return Record(id=file.name, images=(file,))


class OurTransform:
    """Decodes and processes as the encoders' processor does."""

    def __init__(self) -> None:
        from perception_jax.data.processors import ImageProcessor

        self.processor = ImageProcessor(size=SIDE)

    def __call__(self, record: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"image": self.processor.read(record.image, name=record.id).pixels}


def our_batches(folder: pathlib.Path, workers: int) -> Iterator[np.ndarray]:
    from perception_jax.data.loader import make_loader

    loader = make_loader(
        OurSource(folder),
        OurTransform(),
        batch_size=BATCH,
        seed=0,
        num_workers=workers,
        host=(0, 1),
    )
    return (batch["image"] for batch in loader)


class TheirImages:
    """A map-style dataset of torch with the same work, written as plainly as most are."""

    def __init__(self, folder: pathlib.Path):
        self.files = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        import torch

        with PIL.Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        scale = SIDE / min(image.size)
        width, height = (round(scale * side) for side in image.size)
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2
        return torch.from_numpy(np.array(image.crop((left, top, left + SIDE, top + SIDE))))


def their_batches(folder: pathlib.Path, workers: int) -> Iterator[Any]:
    import torch

    images = TheirImages(folder)
    # Without end, as at an epoch's end the workers would wait.
    order = torch.utils.data.RandomSampler(images, replacement=True, num_samples=10**9)
    return iter(
        torch.utils.data.DataLoader(images, batch_size=BATCH, sampler=order, num_workers=workers)
    )


def processor_seconds() -> float:
    """Processor time of this process and of all that it started."""
    ticks, parents = {}, {}
    for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = file.read_text().rpartition(")")[2].split()
            number = int(file.parent.name)
            parents[number], ticks[number] = int(fields[1]), sum(map(int, fields[11:15]))
    mine = {os.getpid()}
    while more := {number for number, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return sum(ticks[number] for number in mine) / os.sysconf("SC_CLK_TCK")


def measured(batches: Iterator[Any], count: int) -> dict[str, float]:
    """Images per second of processor time, and per second, over `count` batches."""
    for _ in range(WARM_UP):
        next(batches)
    start, busy = time.perf_counter(), processor_seconds()
    for _ in range(count):
        batch = next(batches)
    assert tuple(batch.shape) == (BATCH, SIDE, SIDE, 3)
    images = count * BATCH
    return {
        "per_core": images / (processor_seconds() - busy),
        "per_second": images / (time.perf_counter() - start),
    }


def child(side: str, folder: str, workers: str, count: str) -> None:
    """One turn; prints the rates."""
    make = our_batches if side.startswith("ours") else their_batches
    batches = make(pathlib.Path(folder), int(workers) if side.endswith("workers") else 0)
    print(json.dumps(measured(batches, int(count))), flush=True)
    os._exit(0)  # workers end when this process does


def turn(side: str, folder: str, given: argparse.Namespace) -> dict[str, float]:
    counts = [str(given.workers), str(given.images // BATCH)]
    command = [sys.executable, __file__, "--child", side, folder, *counts]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def same_pixels(folder: pathlib.Path) -> float:
    """The share of equal values of both sides' images."""
    ours, theirs = OurTransform(), TheirImages(folder)
    rng = np.random.default_rng(0)
    pairs = [
        (ours(OurSource(folder)[k], rng)["image"], theirs[k].numpy()) for k in range(0, FILES, 32)
    ]
    return float(np.mean([np.mean(a == b) for a, b in pairs]))


def flops_per_example() -> int:
    """Model FLOPs of a training step of CLIP ViT-L/14-336, per example."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from perception_jax.models.clip.config import ClipConfig
    from perception_jax.models.clip.modeling import Clip
    from perception_jax.shard.flops import gradient_flops

    config = ClipConfig.vit_l14_336()
    graph, params = nnx.split(nnx.eval_shape(lambda: Clip(config, rngs=nnx.Rngs(params=0))))

    def loss(params: Any, pixels: jax.Array, ids: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        return jnp.sum(model.vision(pixels).embedding * model.text(ids).embedding)

    pixels = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, config.text.context), jnp.int32)
    return gradient_flops(loss, params, pixels, ids)


def demand() -> dict[str, float]:
    """Examples per second of a v5e chip at `MFU`."""
    from perception_jax.shard import slices

    flops = flops_per_example()
    return {"flops": flops, "examples_per_s": MFU * slices.find("v5e-1").flops / flops}


def summary(
    turns: Mapping[str, Sequence[Mapping[str, float]]], needed: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """Medians of each side, printed."""
    medians = {
        side: statistics.median(turn["per_core"] for turn in found) for side, found in turns.items()
    }
    against = max((rate for side, rate in medians.items() if "torch" in side), default=None)
    rows = {}
    for side, rate in medians.items():
        rows[side] = {"per_core": rate, "cores_per_chip": needed["examples_per_s"] / rate}
        line = (
            f"{side:14} {rate:6.1f} images/s/core, {rows[side]['cores_per_chip']:.2f} cores a chip"
        )
        if against is not None:
            rows[side]["over_torch"] = rate / against
            line += f", {rate / against:.2f} times torch"
        print(line)
    return rows


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["--child"]:
        child(*argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024, help="of each turn")
    parser.add_argument("--out", type=pathlib.Path, help="JSON with the numbers")
    given = parser.parse_args(argv)
    against = importlib.util.find_spec("torch") is not None
    sides = [side for side in SIDES if against or side.startswith("ours")]
    turns: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        write_images(pathlib.Path(folder))
        size = sum(file.stat().st_size for file in pathlib.Path(folder).iterdir()) / FILES
        print(f"files of {size / 1e3:.0f} kB on average", flush=True)
        if against:
            same = same_pixels(pathlib.Path(folder))
            print(f"{same:.1%} of the values are the same on both sides", flush=True)
        for _ in range(given.rounds):
            for side in sides:
                turns[side].append(turn(side, folder, given))
                rates = turns[side][-1]
                print(
                    f"{side:14} {rates['per_core']:6.1f} images/s/core, "
                    f"{rates['per_second']:6.1f} images/s by the clock",
                    flush=True,
                )
    needed = demand()
    print(
        f"ViT-L/14-336: {needed['flops'] / 1e12:.2f} TFLOP an example, "
        f"{needed['examples_per_s']:.0f} examples/s of a v5e chip at {MFU:.0%} MFU"
    )
    rows = summary(turns, needed)
    if given.out:
        found = {"turns": turns, "medians": rows, "needed": needed, "file_bytes": size}
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
